"""Writes the graphs of a bundle's variants, and the factors that live variants bind to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora_export.graph.decoder_graph import build_graph
from edgelora_export.graph.live_slots import pack_live_adapter
from edgelora_export.graph.nodes import list_blobs, pack_graph
from edgelora_export.graph.stages import split_graphs
from edgelora_export.plan.targets import CPU, TARGETS
from edgelora_export.weights.fp16_copies import Fp16Copies
from edgelora_export.weights.publish import write_file, write_hashed
from edgelora_runtime.bundle.manifest import GraphEntry, StageEntry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgelora_export.bundle.plan import BundlePlan
    from edgelora_export.bundle.weights import BundleWeights
    from edgelora_export.plan.variants import Variant

_LIVE_STEM = "live"  # file stem of the graph that all live variants share. No variant may have this name


def write_graphs(
    plan: BundlePlan, folder: Path, variants: Sequence[Variant], weights: BundleWeights, targets: Sequence[str]
) -> dict[str, dict[str, GraphEntry]]:
    """Writes a graph for each variant and target, one for all live variants, and stages of large cpu graphs that share weights.

    Requires: the weights of each variant are stored in the folder.
    Ensures: each graph maps only blobs of the folder. Returns graphs by variant and target.
    """
    stems = {variant.name: variant.name if variant.live is None else _LIVE_STEM for variant in variants}
    sources = {stems[variant.name]: variant for variant in variants}
    live = find_live_products(plan, variants)
    written: dict[str, dict[str, GraphEntry]] = {stem: {} for stem in sources}
    for name in targets:
        target, copies = TARGETS[name], Fp16Copies(folder, plan.decoder.wide_norms)
        models = {}
        for stem, variant in sources.items():
            stored = weights.get(variant) if target.float_type == CPU.float_type else copies.copy(weights.get(variant))
            inputs = live if stem == _LIVE_STEM else frozenset[str]()
            models[stem] = build_graph(plan.decoder_of(variant), stored, folder, live=inputs, target=target)
        stages = split_graphs(models, folder) if target is CPU else {}
        for stem, model in models.items():
            file = f"{stem}.{name}.onnx"
            write_file(folder / file, [pack_graph(model)])
            parts = [(write_hashed(folder, pack_graph(stage), ".onnx"), list_blobs(stage)) for stage in stages.get(stem, ())]
            entries = tuple(StageEntry(*part) for part in parts)
            written[stem][name] = GraphEntry(file, list_blobs(model), entries)
    return {name: written[stem] for name, stem in stems.items()}


def write_live_adapters(plan: BundlePlan, folder: Path, variants: Sequence[Variant]) -> dict[str, str]:
    """Writes the factors of all live adapters if a variant is live. Returns the file of each adapter."""
    if all(variant.live is None for variant in variants):
        return {}
    files = {name: f"{name}.adapter.safetensors" for name in plan.live_adapters}
    for name, file in files.items():
        if not (folder / file).exists():
            write_file(folder / file, [pack_live_adapter(plan.decoder, plan.live_adapters[name])])
    return files


def find_live_products(plan: BundlePlan, variants: Sequence[Variant]) -> frozenset[str]:
    """Names the products that take LoRA inputs: those that a live adapter changes, if a variant is live."""
    if all(variant.live is None for variant in variants):
        return frozenset()
    modules = frozenset[str]().union(*(adapter.modules for adapter in plan.live_adapters.values()))
    return frozenset(linear.name for linear in plan.decoder.linears if not modules.isdisjoint(linear.modules))
