"""A picture per variant: what each product keeps of the adapter, and how loud the quantization error is beside it. HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora.report.pictures import draw_bars, render_page, render_table

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_runtime.bundle.manifest import FidelityEntry, Manifest, VariantEntry


def write_reports(manifest: Manifest, folder: Path) -> list[Path]:
    """Writes <variant>.html for each variant with figures, and says which files these are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, variant in manifest.variants.items():
        if variant.fidelity is not None:
            path = folder / f"{name}.html"
            path.write_text(_render(name, variant, variant.fidelity), encoding="utf-8")
            paths.append(path)
    return paths


def _render(name: str, variant: VariantEntry, found: FidelityEntry) -> str:
    losses = "; ".join(f"{base} {loss:.4f}" for base, loss in variant.merge_losses.items())
    facts = {
        "gate": found.outcome,
        "adapter's effect kept": "–" if found.retention is None else f"{found.retention:.4f}",
        "KL to the unmerged adapter, mean (nats per token)": f"{found.kl_mean:.4g}",
        "KL, 99th percentile": f"{found.kl_p99:.4g}",
        "KL to the same on the base of its training": "–" if found.trained_kl is None else f"{found.trained_kl:.4g}",
        "KL of the bare base": f"{found.adapter_kl:.4g}",
        "same likeliest token": f"{found.top1:.4f}",
        "perplexity": f"{found.perplexity:.3f}",
        "perplexity of the unmerged adapter": f"{found.teacher_perplexity:.3f}",
        "merged into": "–" if variant.kind == "live" or not variant.mix else variant.merge_base,
        "held-out loss by base": losses or "–",
        "tokens judged on": str(found.tokens),
        "products in 8 bits": ", ".join(variant.int8) or "none",
    }
    charts = ""
    if found.products:
        kept = {product: figures.delta_projection for product, figures in found.products.items()}
        noise = {product: figures.noise for product, figures in found.products.items()}
        changed = {product: figures.codes_changed for product, figures in found.products.items()}
        charts = (
            draw_bars("Retention of the weights, ⟨Q(W+Δ)-Q(W), Δ⟩ / ‖Δ‖² (1 keeps all)", kept, "#2a7")
            + draw_bars("Error of the outputs over the adapter's own effect (0 is exact)", noise, "#c53")
            + draw_bars("Share of codes that the adapter changes", changed, "#36c")
        )
    return render_page(name, render_table(facts.items()), charts)
