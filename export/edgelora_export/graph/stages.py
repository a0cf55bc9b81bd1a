"""Cuts the graphs of a bundle into stages, so that variants share the sessions of those whose weights are the same.

A stage is a graph of its own, and a graph's stages, run one after the other, compute what it computes. What may be cut apart are
blocks: the embedding with the first attention, each MLP, each attention, the head. A graph is cut where the set of graphs changes
that it shares a block with: variants that differ in their attention come apart at every block.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING

import onnx_ir as ir

from edgelora_export.graph.nodes import mapped_blobs, pack_graph

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CUT = "cut"  # begins the names of values that cross a cut: cut.{index}.sum, cut.{index}.update
LEAST_BYTES = 16 << 20  # of weights per stage, on average: calling one costs as long as reading some 0.5 MB (docs/log.md)
LEAST_SHARED = 0.5  # of a graph's weights; below that the price in decoding is not worth it


def split_graphs(models: Mapping[str, ir.Model], folder: Path) -> dict[str, list[ir.Model]]:
    """The stages, in the order in which they run, of each graph that is large enough and shares enough.

    models: graphs of one decoder, as build_graph makes them, with their blobs in folder.
    """
    large = {name: model for name, model in models.items() if sum(_measure([model], folder)) >= 2 * LEAST_BYTES}
    blocks = {name: _cut(model, range(_count_cuts(model))) for name, model in large.items()}
    packed = {name: [pack_graph(block) for block in parts] for name, parts in blocks.items()}
    stages: dict[str, list[ir.Model]] = {}
    for name, model in large.items():
        partners = [{other for other in large if packed[other][index] == block} for index, block in enumerate(packed[name])]
        sizes = _measure(blocks[name], folder)
        cuts = [index for index in range(len(sizes) - 1) if partners[index] != partners[index + 1]]
        shared = sum(size for size, sharing in zip(sizes, partners, strict=True) if len(sharing) > 1)
        pays = shared >= LEAST_SHARED * sum(sizes) and sum(sizes) >= LEAST_BYTES * (len(cuts) + 1)
        if cuts and pays:
            stages[name] = _cut(model, cuts)
    return stages


def _measure(blocks: Sequence[ir.Model], folder: Path) -> list[int]:
    """Bytes of each block's weights, without what others map as well, which are norms and tables."""
    mapped = [mapped_blobs(block) for block in blocks]
    counts = Counter(blob for blobs in mapped for blob in blobs)
    return [sum((folder / blob).stat().st_size for blob in blobs if counts[blob] == 1) for blobs in mapped]


def _count_cuts(model: ir.Model) -> int:
    names = (re.fullmatch(rf"{CUT}\.(\d+)\.sum", str(value.name)) for node in model.graph for value in node.outputs)
    return sum(match is not None for match in names)


def _cut(model: ir.Model, cuts: Sequence[int]) -> list[ir.Model]:
    """The graph in the pieces that lie between these cuts."""
    bounds = [None, *cuts, None]
    return [_extract(model, first, last) for first, last in itertools.pairwise(bounds)]


def _extract(model: ir.Model, first: int | None, last: int | None) -> ir.Model:
    """What lies between two cuts, or behind the last and before the first."""
    graph = model.graph
    crossing_in, crossing_out = (
        [] if index is None else [f"{CUT}.{index}.{role}" for role in ("sum", "update")] for index in (first, last)
    )
    # Attention i comes before cut 2 i.
    layers = range(0 if first is None else first // 2 + 1, _count_cuts(model) // 2 if last is None else last // 2 + 1)
    presents = [f"present.{layer}.{kind}" for layer in layers for kind in ("key", "value")]
    ends = [str(value.name) for value in graph.outputs if not str(value.name).startswith("present.")] if last is None else []
    inputs = [*crossing_in, *(str(value.name) for value in graph.inputs)]
    part = ir.convenience.extract(graph, inputs, [*presents, *ends, *crossing_out])
    for value in [value for value in part.inputs if not value.uses()]:
        part.inputs.remove(value)
    _put_in_order(part)
    called = {node.op_identifier() for node in part}
    functions = [function.clone() for identifier, function in model.functions.items() if identifier in called]
    return ir.Model(part, ir_version=model.ir_version, producer_name=model.producer_name, functions=functions)


def _put_in_order(part: ir.Graph) -> None:
    """Names values by place and sorts weights, so that equal parts of different graphs are equal bytes."""
    outputs = set(part.outputs)
    for place, node in enumerate(part):
        node.name = None
        for index, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = f"{place}.{index}"
    weights = sorted(part.initializers.items())
    part.initializers.clear()
    for _, value in weights:
        if value.uses():  # defaults of inputs that went elsewhere are left over
            part.register_initializer(value)
