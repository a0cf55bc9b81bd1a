"""Graphs of single layers whose weights are inputs: one session streams through a model that memory could not hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from edgelora_export.block import Positions, Residual, add_block
from edgelora_export.graph import read_logits
from edgelora_export.graph_builder import GraphBuilder, InputWeights, describe, graph_input

if TYPE_CHECKING:
    from edgelora_export.decoder import Decoder

HIDDEN, HIDDEN_OUT, LOGITS = "hidden", "hidden_out", "logits"


def build_layer_graph(decoder: Decoder, index: int) -> tuple[ir.Model, dict[str, str], tuple[str, ...]]:
    """One block in float32, from position 0 on: the graph, its weight inputs, and its outputs that tap the products.

    The graph maps `hidden` (1, S, H) to `hidden_out` (1, S, H); the first block's `hidden` is the embedding's rows times
    decoder.embedding_multiplier. The weight inputs: by the weight's name in the whole graph, the
    input's. The taps: for each product of the layer, in its order, the output that gives its input (1, S, K).
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
    taps = []
    for place, linear in enumerate(layer.linears):
        tap = b.op("Identity", block.taps[linear.name])
        describe(tap, f"tap.{place}", ir.DataType.FLOAT, (1, "S", linear.columns))
        taps.append(tap)
    model = b.finish([hidden, *weights.inputs.values()], [out, *taps])
    return model, {name: str(value.name) for name, value in weights.inputs.items()}, tuple(str(tap.name) for tap in taps)


def build_head_graph(decoder: Decoder) -> tuple[ir.Model, dict[str, str]]:
    """The final norm and the head in float32: `hidden` (1, S, H) to `logits` (1, S, V), and the weight inputs.

    V is as many rows of the head as are fed.
    """
    weights = InputWeights("")
    b = GraphBuilder(weights)
    hidden = graph_input(HIDDEN, ir.DataType.FLOAT, (1, "S", decoder.hidden_size))
    logits = read_logits(b, decoder, Residual(b, decoder, hidden))
    describe(logits, LOGITS, ir.DataType.FLOAT, (1, "S", "V"))
    model = b.finish([hidden, *weights.inputs.values()], [logits])
    return model, {name: str(value.name) for name, value in weights.inputs.items()}
