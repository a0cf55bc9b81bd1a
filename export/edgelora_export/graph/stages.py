"""Splits the graphs of a bundle into stages, so that variants share the sessions of stages with equal weights.

A stage is a graph. Run one after the other, the stages of a graph compute what the graph computes.
A graph can be cut into these pieces: the embedding with the first attention, each MLP, each further attention, and the head. It
is cut where the set of graphs that share the piece changes. Variants that differ in their attention are cut at every piece.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING

import onnx_ir as ir

from edgelora_export.graph.nodes import list_blobs, pack_graph

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

CUT = "cut"  # prefix of the values that cross a cut: cut.{index}.sum, cut.{index}.update
LEAST_BYTES = 16 << 20  # of weights per stage, on average. A call takes as long as reading some 0.5 MB (docs/log.md)
LEAST_SHARED = 0.5  # of a graph's weights. Sharing less is not worth the slower decoding


def split_graphs(models: Mapping[str, ir.Model], folder: Path) -> dict[str, list[ir.Model]]:
    """Splits each graph that is large enough and shares enough into stages. Returns the stages in the order in which they run.

    Requires: `models` are cpu graphs of variants of one base made by build_graph, and their blobs lie in `folder`.
    Ensures: the models are unchanged. A model that is not worth splitting has no entry. Stages with equal nodes and equal weights
    are equal bytes.
    """
    large = {name: model for name, model in models.items() if sum(_measure_weights([model], folder)) >= 2 * LEAST_BYTES}
    pieces = {name: _cut_graph(model, range(_count_cuts(model))) for name, model in large.items()}
    packed = {name: [pack_graph(piece) for piece in parts] for name, parts in pieces.items()}
    stages: dict[str, list[ir.Model]] = {}
    for name, model in large.items():
        partners = [{other for other in large if packed[other][index] == piece} for index, piece in enumerate(packed[name])]
        sizes = _measure_weights(pieces[name], folder)
        cuts = [index for index in range(len(sizes) - 1) if partners[index] != partners[index + 1]]
        shared = sum(size for size, sharing in zip(sizes, partners, strict=True) if len(sharing) > 1)
        pays = shared >= LEAST_SHARED * sum(sizes) and sum(sizes) >= LEAST_BYTES * (len(cuts) + 1)
        if cuts and pays:
            stages[name] = _cut_graph(model, cuts)
    return stages


def _measure_weights(pieces: Sequence[ir.Model], folder: Path) -> list[int]:
    """Sums the bytes of each piece's weights, without blobs that several pieces map, such as norms and tables."""
    mapped = [list_blobs(piece) for piece in pieces]
    counts = Counter(blob for blobs in mapped for blob in blobs)
    return [sum((folder / blob).stat().st_size for blob in blobs if counts[blob] == 1) for blobs in mapped]


def _count_cuts(model: ir.Model) -> int:
    names = (re.fullmatch(rf"{CUT}\.(\d+)\.sum", str(value.name)) for node in model.graph for value in node.outputs)
    return sum(match is not None for match in names)


def _cut_graph(model: ir.Model, cuts: Sequence[int]) -> list[ir.Model]:
    """Cuts a graph into the pieces between these cuts."""
    bounds = [None, *cuts, None]
    return [_extract_stage(model, first, last) for first, last in itertools.pairwise(bounds)]


def _extract_stage(model: ir.Model, first: int | None, last: int | None) -> ir.Model:
    """Extracts the piece between two cuts. None stands for the start or the end of the graph."""
    graph = model.graph
    crossing_in, crossing_out = (
        [] if index is None else [f"{CUT}.{index}.{role}" for role in ("sum", "update")] for index in (first, last)
    )
    # Attention i comes before cut 2 i.
    layers = range(0 if first is None else first // 2 + 1, _count_cuts(model) // 2 if last is None else last // 2 + 1)
    presents = [f"present.{layer}.{kind}" for layer in layers for kind in ("key", "value")]
    finals = [str(value.name) for value in graph.outputs if not str(value.name).startswith("present.")] if last is None else []
    inputs = [*crossing_in, *(str(value.name) for value in graph.inputs)]
    stage = ir.convenience.extract(graph, inputs, [*presents, *finals, *crossing_out])
    for value in [value for value in stage.inputs if not value.uses()]:
        stage.inputs.remove(value)
    _canonicalize(stage)
    called = _find_functions(model, stage)
    functions = [function.clone() for identifier, function in model.functions.items() if identifier in called]
    return ir.Model(stage, ir_version=model.ir_version, producer_name=model.producer_name, functions=functions)


def _find_functions(model: ir.Model, nodes: Iterable[ir.Node]) -> set[ir.OperatorIdentifier]:
    """Finds the functions that the nodes call, themselves or through other functions."""
    called = {node.op_identifier() for node in nodes} & set(model.functions)
    return called.union(*(_find_functions(model, model.functions[identifier]) for identifier in called))


def _canonicalize(stage: ir.Graph) -> None:
    """Names values by their place and sorts weights, so that equal pieces of different graphs are equal bytes."""
    outputs = set(stage.outputs)
    for place, node in enumerate(stage):
        node.name = None
        for index, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = f"{place}.{index}"
    weights = sorted(stage.initializers.items())
    stage.initializers.clear()
    for _, value in weights:
        if value.uses():  # extract() also returns the defaults of inputs that other stages read
            stage.register_initializer(value)
