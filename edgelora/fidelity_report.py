"""A picture per variant: what each product keeps of the adapter, and how loud the quantization error is beside it. HTML."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_runtime.manifest import FidelityEntry, Manifest, VariantEntry

_WIDTH, _ROW, _LABEL = 300, 18, 220  # pixels: of a bar of full length, of a row, of the names
_STYLE = (
    "body{font:14px system-ui;margin:2em;color:#222;background:#fff}td,th{padding:.2em 1em .2em 0;text-align:left}"
    "text{font:12px system-ui}svg{margin:1em 0}"
)


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
    table = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts.items())
    charts = ""
    if found.products:
        kept = {product: figures.retention for product, figures in found.products.items()}
        noise = {product: figures.noise for product, figures in found.products.items()}
        changed = {product: figures.codes_changed for product, figures in found.products.items()}
        charts = (
            _bars("Retention of the weights, ⟨Q(W+Δ)-Q(W), Δ⟩ / ‖Δ‖² (1 keeps all)", kept, "#2a7")
            + _bars("Error of the outputs over the adapter's own effect (0 is exact)", noise, "#c53")
            + _bars("Share of codes that the adapter changes", changed, "#36c")
        )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(name)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(name)}</h1><table>{table}</table>{charts}</html>\n"
    )


def _bars(title: str, values: dict[str, float], color: str) -> str:
    largest = max(1.0, *values.values())
    rows = []
    for place, (product, value) in enumerate(values.items()):
        y = place * _ROW
        length = max(0.0, value) / largest * _WIDTH
        rows.append(
            f"<text x={_LABEL - 8} y={y + 13} text-anchor=end>{escape(product)}</text>"
            f'<rect x={_LABEL} y={y + 2} width={length:.1f} height={_ROW - 5} fill="{color}"/>'
            f"<text x={_LABEL + length + 6:.1f} y={y + 13}>{value:.3f}</text>"
        )
    height, width = len(values) * _ROW, _LABEL + _WIDTH + 80
    return f"<h2>{escape(title)}</h2><svg width={width} height={height} role=img>{''.join(rows)}</svg>"
