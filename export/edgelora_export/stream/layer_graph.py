"""Graphs of single layers whose weights are inputs: one session streams through a model that memory could not hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgelora_export.graph.block import Positions, Residual, add_block
from edgelora_export.graph.decoder_graph import read_logits
from edgelora_export.graph.nodes import GraphBuilder, InputWeights, describe, graph_input

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from edgelora_export.decoder.description import Decoder

HIDDEN, HIDDEN_OUT, LOGITS = "hidden", "hidden_out", "logits"


@dataclass(frozen=True)
class WeightlessGraph:
    """A graph that is fed its weights.

    weights: by a weight's name in the whole graph, the input's name here. taps: by a product's name, the output that is its
    input (1, S, K).
    """

    model: ir.Model
    weights: Mapping[str, str]
    taps: Mapping[str, str] = field(default_factory=dict)


def build_layer_graph(decoder: Decoder, index: int, tapped: Collection[str] = (), *, whole: bool = True) -> WeightlessGraph:
    """One block in float32, from position 0 on: `hidden` (1, S, H) to `hidden_out` (1, S, H).

    The first block's `hidden` is the embedding's rows times decoder.embedding_multiplier. tapped: the products that have
    taps. whole: False leaves out `hidden_out` and all that no tap needs.
    """
    layer = decoder.layers[index]
    weights = InputWeights(f"layers.{index}.")
    b = GraphBuilder(weights)
    hidden = graph_input(HIDDEN, ir.DataType.FLOAT, (1, "S", decoder.hidden_size))
    length = b.op("Cast", b.op("Gather", b.op("Shape", hidden), b.constant("index_1", [1]), axis=0), to=ir.DataType.INT32)
    last = b.op("Cast", b.op("Sub", b.op("Cast", length, to=ir.DataType.INT64), b.constant("one", [1])), to=ir.DataType.INT32)
    positions = Positions(last, b.op("Squeeze", length))
    residual = Residual(b, decoder, hidden)
    block = add_block(b, decoder, layer, residual, (None, None), positions)
    out = residual.total()
    describe(out, HIDDEN_OUT, ir.DataType.FLOAT, (1, "S", decoder.hidden_size))
    taps = {product: b.op("Identity", block.taps[product]) for product in tapped}
    for place, linear in enumerate(layer.linears):
        if linear.name in taps:
            describe(taps[linear.name], f"tap.{place}", ir.DataType.FLOAT, (1, "S", linear.columns))
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
    """The final norm and the head in float32: `hidden` (1, S, H) to `logits` (1, S, V), V being as many rows as are fed."""
    weights = InputWeights("")
    b = GraphBuilder(weights)
    hidden = graph_input(HIDDEN, ir.DataType.FLOAT, (1, "S", decoder.hidden_size))
    logits = read_logits(b, decoder, Residual(b, decoder, hidden).normed(decoder.final_norm))
    describe(logits, LOGITS, ir.DataType.FLOAT, (1, "S", "V"))
    model = b.finish([hidden, *weights.inputs.values()], [logits])
    return WeightlessGraph(model, {name: str(value.name) for name, value in weights.inputs.items()})
