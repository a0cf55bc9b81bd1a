"""The page of one variant, compared with its unmerged adapter.

It shows their distance, and what each product keeps of the adapter's change.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from edgelora.formatting import format_bytes
from edgelora.report import palette
from edgelora.report.elements import element, join
from edgelora.report.page import NONE, render_cards, render_facts, render_note, render_page, render_section
from edgelora.report.pictures import Bar, HeatMap, draw_bars, draw_heat_maps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgelora.inspection import VariantDescription
    from edgelora.report.elements import Html
    from edgelora.report.palette import Scale
    from edgelora_runtime.bundle.manifest import FidelityEntry, ProductFidelity

INDEX = "index.html"
_PRODUCT = re.compile(r"layers\.(\d+)\.(.+)")
_OUTCOMES = {
    "measured": "no adapter, so the gate had nothing to check",
    "passed": "keeps what the gate asks for",
    "repaired": "changed until it passed the gate",
    "live": "its adapters stay unquantized",
}


def render_variant(bundle: str, item: VariantDescription, found: FidelityEntry) -> Html:
    """The page of a variant with its figures. bundle: its name."""
    teacher = "the unmerged adapter" if item.mix else "the float base"
    kept = [] if found.retention is None else [("Adapter kept", format_kept(found), "1 is the whole adapter")]
    cards = (
        ("Outcome", found.outcome, _OUTCOMES[found.outcome]),
        *kept,
        ("KL, mean", f"{found.kl_mean:.3g}", "nats per token; 0 is no difference"),
        ("Same top token", f"{found.top1:.3f}", f"share of {found.tokens} tokens"),
        *(
            [("Same answers", f"{found.answers_kept} of {found.answers}", f"of those that {teacher} writes")]
            if found.answers
            else []
        ),
    )
    title = f"What variant “{item.name}” keeps of {'its adapters' if item.mix else teacher}"
    lead = join((f"{item.kind.capitalize()} variant of the bundle ", element("b", bundle), f": {name_mix(item)}."))
    return render_page(
        title,
        lead,
        render_section("summary", f"Against {teacher}", render_cards(cards), _draw_divergence(found)),
        render_section("products", "Product by product", _draw_products(item, found.products)),
        render_section("figures", "All figures", render_facts(f"All figures of {item.name}", _list_facts(item, found, teacher))),
        context=bundle,
        links=[(f"All variants of “{bundle}”", INDEX)],
    )


def name_mix(item: VariantDescription) -> str:
    """The weights and method of a mix, such as: 0.7 sql + 0.5 law by ties."""
    if not item.mix:
        return "bare base"
    terms = (f"{name} by module" if name in item.weights else f"{weight:g} {name}" for name, weight in item.mix.items())
    return " + ".join(terms) + ("" if item.method == "linear" else f" by {item.method}")


def format_kept(found: FidelityEntry) -> str:
    """Formats the share of its adapters that a variant keeps. The bare base gets a dash."""
    return NONE if found.retention is None else f"{found.retention:.4f}"


def _draw_divergence(found: FidelityEntry) -> Html:
    note = "KL divergence on held-out text; shorter is better, and at 0 both predict the same."
    legend = {"disturbance": "this variant"}
    bars = []
    if found.retention is not None:
        note += " Adapter kept is 1 − the mean of this variant / the mean of the bare base."
        legend = {"share": "the bare base, for comparison", **legend}
        bars.append(Bar("bare base, mean", found.adapter_kl, f"{found.adapter_kl:.4g}", "share"))
    bars += [
        Bar("variant, mean", found.kl_mean, f"{found.kl_mean:.4g}", "disturbance"),
        Bar("variant, 99th percentile", found.kl_p99, f"{found.kl_p99:.4g}", "disturbance"),
    ]
    if found.trained_kl is not None:
        note += " The last bar compares with the adapter on the quantized base that it was trained on."
        bars.append(Bar("variant, mean, on the trained base", found.trained_kl, f"{found.trained_kl:.4g}", "disturbance"))
    teacher = "the float base" if found.retention is None else "the unmerged adapter on the float base"
    return draw_bars(f"Divergence from {teacher}", note, "nats per token", bars, legend)


def _draw_products(item: VariantDescription, products: Mapping[str, ProductFidelity]) -> Html:
    """Heat maps with a row per kind of product and a column per layer."""
    if not products:
        why = "A live variant's adapters are not quantized" if item.kind == "live" else "No product of this variant was measured"
        return render_note(f"{why}, so there is nothing to show here.")
    places = {name: (match[2], match[1]) if (match := _PRODUCT.fullmatch(name)) else (name, NONE) for name in products}
    kinds = [*dict.fromkeys(kind for kind, _ in places.values())]
    layers = sorted({layer for _, layer in places.values()}, key=lambda layer: (layer == NONE, len(layer), layer))
    by_place = {place: products[name] for name, place in places.items()}
    ringed = frozenset((kinds.index(kind), layers.index(layer)) for (kind, layer), one in by_place.items() if one.bits == 8)

    def draw(title: str, note: str, scale: Scale, ends: tuple[str, str], value: Callable[[ProductFidelity], float]) -> HeatMap:
        cells = [[value(one) if (one := by_place.get((kind, layer))) else None for layer in layers] for kind in kinds]
        columns = "layer, from input to output"
        return HeatMap(title, note, scale, "product", kinds, columns, layers, cells, ends, ringed, "stored in 8 bits")

    maps = (
        draw(
            "Projection on the adapter's change",
            "How much of the change Δ to each weight W is left after quantization Q: ⟨Q(W + Δ) − Q(W), Δ⟩ / ‖Δ‖².",
            palette.KEPT,
            ("0: nothing left", "1: all of it"),
            lambda one: one.delta_projection,
        ),
        draw(
            "Error of the outputs",
            "Size of the quantization error on held-out inputs, as a multiple of what Δ adds to the same outputs.",
            palette.DISTURBANCE,
            ("0: exact", "1 or more: as large as what Δ adds"),
            lambda one: one.noise,
        ),
        draw(
            "Codes changed",
            "Share of the quantized codes that differ from the bare base's: what this variant cannot share with it.",
            palette.SHARE,
            ("0: none", "1: all"),
            lambda one: one.codes_changed,
        ),
    )
    return draw_heat_maps(maps)


def _name_merge_base(item: VariantDescription) -> str:
    return f"the trained base, held as {item.trained_on}" if item.merge_base == "trained" else "the float base"


def _list_facts(item: VariantDescription, found: FidelityEntry, teacher: str) -> list[tuple[str, str]]:
    losses = ", ".join(f"{base} {loss:.4f}" for base, loss in item.merge_losses.items())
    by_module = "; ".join(
        f"{adapter}: " + ", ".join(f"{weight:g} on {pattern}" for pattern, weight in weights.items())
        for adapter, weights in item.weights.items()
    )
    facts = {
        "Mix": name_mix(item),
        "Weights by module": by_module,
        "Density": "" if item.density is None else f"{item.density:g}",
        "Seed": "" if item.seed is None else str(item.seed),
        "Merged into": "" if item.kind == "live" or not item.mix else _name_merge_base(item),
        "Held-out loss by base": f"{losses} nats per token" if losses else "",
        "Outcome": found.outcome,
        "Measured with kernels of": found.kernels,
        "Adapter kept": "" if found.retention is None else format_kept(found),
        "KL, mean": f"{found.kl_mean:.4g} nats per token",
        "KL, 99th percentile": f"{found.kl_p99:.4g} nats per token",
        "KL on the trained base": "" if found.trained_kl is None else f"{found.trained_kl:.4g} nats per token",
        "KL of the bare base": "" if found.retention is None else f"{found.adapter_kl:.4g} nats per token",
        "Same top token": f"{found.top1:.4f}",
        "Same answers": f"{found.answers_kept} of the {found.answers} that {teacher} writes" if found.answers else "",
        "Perplexity": f"{found.perplexity:.3f}",
        f"Perplexity of {teacher}": f"{found.teacher_perplexity:.3f}",
        "Held-out tokens": str(found.tokens),
        "Calibration": "" if item.calibration is None else _name_calibration(item),
        "Products in 8 bits": ", ".join(item.int8) or "none",
        "Vocabulary": "" if item.vocab_size is None else f"{item.vocab_size} tokens",
        "Not shared with the base": " and ".join(item.own_vocab),
        "Size": f"{format_bytes(item.bytes)}, {format_bytes(item.private_bytes)} of its own",
    }
    return [(name, value) for name, value in facts.items() if value]


def _name_calibration(item: VariantDescription) -> str:
    assert item.calibration is not None
    return f"{item.calibration.tokens} tokens of {', '.join(item.calibration.sources)}"
