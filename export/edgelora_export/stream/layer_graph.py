"""Graphs of single layers whose weights are inputs, so that a model larger than memory streams through one session."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgelora_export.graph.block import BlockBuilder, Positions, Residual
from edgelora_export.graph.decoder_graph import read_logits
from edgelora_export.graph.nodes import GraphBuilder, InputWeights, annotate_value, graph_input

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from edgelora_export.decoder.description import Decoder

HIDDEN, HIDDEN_OUT, LOGITS = "hidden", "hidden_out", "logits"


@dataclass(frozen=True)
class WeightlessGraph:
    """A graph that is fed its weights.

    weights: the input's name here, by the weight's name in the whole graph. taps: the output that repeats a product's input (1,
    S, K), by the product's name.
    """

    model: ir.Model
    weights: Mapping[str, str]
    taps: Mapping[str, str] = field(default_factory=dict)


def build_layer_graph(decoder: Decoder, index: int, tapped: Collection[str] = (), *, whole: bool = True) -> WeightlessGraph:
    """Builds one block in float32 that starts at position 0: `hidden` (1, S, H) to `hidden_out` (1, S, H).

    Requires: the first block is fed the embedding's rows times decoder.embedding_multiplier as `hidden`.
    Ensures: layers of the same kind give equal graphs, and each weight is an input that a node reads.

    tapped: the products whose inputs become outputs. whole: False omits `hidden_out` and every node that no tap needs.
    """
    layer = decoder.layers[index]
    weights = InputWeights(f"layers.{index}.")
    b = GraphBuilder(weights)
    hidden = graph_input(HIDDEN, ir.DataType.FLOAT, (1, "S", decoder.hidden_size))
    length = b.op("Cast", b.op("Gather", b.op("Shape", hidden), b.constant("index_1", [1]), axis=0), to=ir.DataType.INT32)
    last = b.op("Cast", b.op("Sub", b.op("Cast", length, to=ir.DataType.INT64), b.constant("one", [1])), to=ir.DataType.INT32)
    positions = Positions(last, b.op("Squeeze", length))
    blocks = BlockBuilder(b, decoder, hidden, positions)
    block = blocks.append(layer, (None, None))
    out = blocks.residual.total()
    annotate_value(out, HIDDEN_OUT, ir.DataType.FLOAT, (1, "S", decoder.hidden_size))
    taps = {product: b.op("Identity", block.taps[product]) for product in tapped}
    for place, linear in enumerate(layer.linears):
        if linear.name in taps:
            annotate_value(taps[linear.name], f"tap.{place}", ir.DataType.FLOAT, (1, "S", linear.columns))
    outputs = [*([out] if whole else []), *taps.values()]
    model = b.finish([hidden, *weights.inputs.values()], outputs)
    if not whole:
        RemoveUnusedNodesPass()(model)
        for value in [value for value in model.graph.inputs if not value.uses()]:
            model.graph.inputs.remove(value)
    kept = set(model.graph.inputs)
    names = {name: str(value.name) for name, value in weights.inputs.items() if value in kept}
    return WeightlessGraph(model, names, {product: str(tap.name) for product, tap in taps.items()})


def build_head_graph(decoder: Decoder) -> WeightlessGraph:
    """Builds the final norm and the head in float32: `hidden` (1, S, H) to `logits` (1, S, V), for any number V of rows."""
    weights = InputWeights("")
    b = GraphBuilder(weights)
    hidden = graph_input(HIDDEN, ir.DataType.FLOAT, (1, "S", decoder.hidden_size))
    logits = read_logits(b, decoder, Residual(b, decoder, hidden).read(decoder.final_norm))
    annotate_value(logits, LOGITS, ir.DataType.FLOAT, (1, "S", "V"))
    model = b.finish([hidden, *weights.inputs.values()], [logits])
    return WeightlessGraph(model, {name: str(value.name) for name, value in weights.inputs.items()})
