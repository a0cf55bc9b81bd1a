"""`edgelora inspect`: what a bundle holds, in bytes per variant and bytes shared, and what each variant keeps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora.terminal import format_bytes, format_share, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgelora_runtime import Bundle
    from edgelora_runtime.bundle.manifest import (
        BaseEntry,
        CalibrationEntry,
        FidelityEntry,
        ModelEntry,
        QuantizationEntry,
        RouterEntry,
        VariantEntry,
    )


@dataclass(frozen=True)
class VariantDescription:
    """A variant, its size, and the manifest's figures of it.

    bytes: all that it maps, adapters included; private_bytes: those that no other maps.
    """

    name: str
    kind: str
    mix: Mapping[str, float]
    weights: Mapping[str, Mapping[str, float]]
    method: str
    density: float | None
    seed: int | None
    bytes: int
    private_bytes: int
    merge_base: str
    trained_on: str | None
    merge_losses: Mapping[str, float]
    int8: Sequence[str]
    calibration: CalibrationEntry | None
    fidelity: FidelityEntry | None


@dataclass(frozen=True)
class BundleDescription:
    """A bundle in figures. bytes: of all files; shared_bytes: of files that more than one variant maps."""

    bytes: int
    shared_bytes: int
    default_variant: str
    base: BaseEntry
    model: ModelEntry
    quantization: QuantizationEntry
    variants: tuple[VariantDescription, ...]
    router: RouterEntry | None


def describe_bundle(bundle: Bundle) -> BundleDescription:
    """Counts which files each variant maps."""
    manifest = bundle.manifest
    sizes = {name: entry.size for name, entry in manifest.files.items()}

    def mapped(variant: VariantEntry) -> set[str]:
        graphs = {name for graph in variant.graphs.values() for name in (graph.file, *graph.blobs)}
        return graphs | {file for name in variant.live if (file := manifest.adapters[name].file) is not None}

    files = {name: mapped(variant) for name, variant in manifest.variants.items()}
    users = Counter(file for used in files.values() for file in used)
    return BundleDescription(
        bytes=sum(sizes.values()),
        shared_bytes=sum(sizes[file] for file, count in users.items() if count > 1),
        default_variant=manifest.default_variant,
        base=manifest.base,
        model=manifest.model,
        quantization=manifest.quantization,
        variants=tuple(
            VariantDescription(
                name,
                variant.kind,
                variant.mix,
                variant.weights,
                variant.method,
                variant.density,
                variant.seed,
                sum(sizes[file] for file in files[name]),
                sum(sizes[file] for file in files[name] if users[file] == 1),
                variant.merge_base,
                variant.trained_on,
                variant.merge_losses,
                variant.int8,
                variant.calibration,
                variant.fidelity,
            )
            for name, variant in manifest.variants.items()
        ),
        router=manifest.router,
    )


def show_bundle(bundle: Bundle, as_json: bool) -> None:
    """Prints the description as tables, or as one JSON object, on standard output."""
    described = describe_bundle(bundle)
    if as_json:
        print_json(described)
        return
    model, grid = described.model, described.quantization
    stored = "float32" if grid.bits == 32 else f"int{grid.bits}, block {grid.block_size}, {grid.method}"
    base = f"base {described.base.name} ({described.base.sha256[:12]})"
    print(f"{bundle.folder}: {model.architecture}, {model.layers} layers, {base}, {stored}")
    rows = [
        [
            item.name + (" *" if item.name == described.default_variant else ""),
            item.kind,
            " + ".join(f"{name} by module" if name in item.weights else f"{w:g} {name}" for name, w in item.mix.items()) or "–",
            item.method if item.mix else "–",
            _name_merge_base(item),
            format_bytes(item.bytes),
            format_bytes(item.private_bytes),
        ]
        for item in described.variants
    ]
    print_table("", ["variant", "kind", "mix", "method", "merged into", "bytes", "of its own"], rows)
    if figures := [_figures(item, item.fidelity) for item in described.variants if item.fidelity is not None]:
        print_table(
            "KL from the unmerged adapter on the float base, and on the base that it was trained on; nats per token",
            ["variant", "gate", "adapter kept", "KL mean", "KL p99", "KL trained", "top-1", "perplexity", "unmerged's", "int8"],
            figures,
        )
    if described.router is not None:
        _show_router(described.router)
    print(f"{format_bytes(described.bytes)} on disk, {format_bytes(described.shared_bytes)} shared; * is the default")


def _show_router(router: RouterEntry) -> None:
    rows = [
        [each.variant or "anything else", str(each.prompts), str(each.held_out), format_share(each.accuracy)]
        for each in router.classes
    ]
    limit = f", and for a confidence below {router.threshold:g}" if router.threshold else ""
    print_table(
        f"router: variant 'auto' picks by the prompt; {router.fallback} for anything else{limit}",
        ["variant", "prompts learnt from", "held out", "of these to their own %"],
        [*rows, ["mean", "", "", format_share(router.accuracy)]],
    )


def _name_merge_base(item: VariantDescription) -> str:
    """The base that a mix was merged into, and the losses of the two that were tried."""
    if item.kind == "live" or not item.mix:
        return "–"
    name = f"trained, {item.trained_on}" if item.merge_base == "trained" else item.merge_base
    losses = [f"{base} {loss:.4g}" for base, loss in item.merge_losses.items()]
    return f"{name} (loss: {', '.join(losses)})" if losses else name


def _figures(item: VariantDescription, found: FidelityEntry) -> list[str]:
    return [
        item.name,
        found.outcome,
        "–" if found.retention is None else f"{found.retention:.4f}",
        f"{found.kl_mean:.2g}",
        f"{found.kl_p99:.2g}",
        "–" if found.trained_kl is None else f"{found.trained_kl:.2g}",
        f"{found.top1:.3f}",
        f"{found.perplexity:.3f}",
        f"{found.teacher_perplexity:.3f}",
        str(len(item.int8)),
    ]
