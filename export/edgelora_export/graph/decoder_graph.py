"""Builds the ONNX graph of a decoder around tensors that already lie in blobs. The graph's own file has a few hundred kB."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgelora_export.graph.block import BlockBuilder, Positions
from edgelora_export.graph.live_inputs import LiveInputs
from edgelora_export.graph.nodes import CONTRIB, BlobWeights, GraphBuilder, annotate_value, graph_input
from edgelora_export.graph.products import find_zero_points, multiply_matrix
from edgelora_export.graph.prologues import join_prologues
from edgelora_export.graph.stages import CUT
from edgelora_export.plan.targets import CPU

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_export.decoder.description import Decoder
    from edgelora_export.graph.block import Residual
    from edgelora_export.plan.targets import Target
    from edgelora_export.weights.stored import StoredWeights

BATCH = "B"  # the symbolic axis of texts that are computed together
_END = np.iinfo(np.int64).max


def build_graph(
    decoder: Decoder, weights: StoredWeights, folder: Path, *, live: frozenset[str] = frozenset(), target: Target = CPU
) -> ir.Model:
    """Builds the graph of one variant.

    Requires: `weights` has every tensor of the decoder by initializer name (see stored.py), in the target's type except for
    wide_norms, and each blob lies in `folder`.
    Ensures: inputs and outputs are those of docs/reference/bundle-format.md, no weight is copied into the graph, and cpu graphs
    name the values at which split_graphs can cut.

    live: names of the products that take LoRA inputs.
    """
    b = GraphBuilder(BlobWeights(weights, folder), target)
    input_ids = graph_input("input_ids", ir.DataType.INT64, (BATCH, "S"))
    mask = graph_input("attention_mask", ir.DataType.INT64, (BATCH, "T"))
    keep = ir.Value(
        name="logits_to_keep",
        shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.zeros(1, np.int64), name="logits_to_keep"),
    )
    positions = _read_positions(b, mask)
    inputs = LiveInputs(b, decoder, live)
    # -0 slices from the start, so logits_to_keep = 0 keeps all positions, as in transformers.
    from_end = b.op("Neg", keep)

    def last_positions(value: ir.Value) -> ir.Value:
        return b.op("Slice", value, from_end, b.constant("end", [_END]), b.constant("axis_1", [1]))

    blocks = BlockBuilder(b, decoder, _embed(b, decoder, input_ids), positions, inputs)
    caches: list[ir.Value] = []
    presents: list[ir.Value] = []
    cache_shape = (BATCH, decoder.kv_heads, "M", decoder.head_size)
    for index, layer in enumerate(decoder.layers):
        names = [f"{index}.{kind}" for kind in ("key", "value")]
        past = [graph_input(f"past_key_values.{name}", b.float_type, cache_shape) for name in names]
        last = index + 1 == len(decoder.layers)
        block = blocks.append(layer, past, last_positions if last else None)
        for value, name in zip((block.key, block.value), names, strict=True):
            annotate_value(value, f"present.{name}", b.float_type, cache_shape)
        caches += past
        presents += (block.key, block.value)
    if target is CPU:
        _name_cuts(blocks.residual, decoder.hidden_size)
    states = blocks.residual.read(decoder.final_norm)
    logits = read_logits(b, decoder, states)
    annotate_value(logits, "logits", ir.DataType.FLOAT, (BATCH, "kept", decoder.vocab_size))
    annotate_value(states, "hidden_states", b.float_type, (BATCH, "kept", decoder.hidden_size))

    model = b.finish([input_ids, mask, *caches, keep, *inputs.inputs], [logits, *presents, states])
    for value in (keep, *inputs.inputs):  # an initializer with an input's name is the input's default
        model.graph.register_initializer(value)
    if target is CPU:
        join_prologues(model)
    return model


def _name_cuts(residual: Residual, hidden_size: int) -> None:
    """Names the values that cross each cut, and gives them the symbolic shape by which the runtime sizes their buffers."""
    for index, crossing in enumerate(residual.cuts):
        kept = index >= len(residual.cuts) - 2  # after its attention, the last block holds only the positions that get logits
        for value, role in zip(crossing, ("sum", "update"), strict=True):
            annotate_value(value, f"{CUT}.{index}.{role}", ir.DataType.FLOAT, (BATCH, "kept" if kept else "S", hidden_size))


def read_logits(b: GraphBuilder, decoder: Decoder, states: ir.Value) -> ir.Value:
    """Applies the head and the logits' soft cap to normed states. The logits are float32, as samplers expect them."""
    logits = b.widen(multiply_matrix(b, decoder.head_product, states, decoder.hidden_size, decoder.vocab_size))
    if decoder.logits_cap is None:
        return logits
    cap = b.scalar(decoder.logits_cap, ir.DataType.FLOAT)  # fp16 would round neighbours near the cap to one value
    return b.op("Mul", b.op("Tanh", b.op("Div", logits, cap)), cap)


def _read_positions(b: GraphBuilder, mask: ir.Value) -> Positions:
    """Derives each text's positions from its row of the attention mask, once for all blocks."""
    length = b.op("ReduceSum", mask, b.constant("axis_1", [1]), keepdims=0)
    last = b.op("Cast", b.op("Sub", length, b.constant("one", [1])), to=ir.DataType.INT32)
    total = b.op("Gather", b.op("Shape", mask), b.constant("index_1", 1), axis=0)
    return Positions(last, b.op("Cast", total, to=ir.DataType.INT32))


def _embed(b: GraphBuilder, decoder: Decoder, input_ids: ir.Value) -> ir.Value:
    """Looks up the embedding's rows, and scales them if the model does."""
    rows = gather_rows(b, input_ids, decoder.vocab_size, decoder.hidden_size)
    return rows if decoder.embedding_multiplier == 1.0 else b.op("Mul", rows, b.scalar(decoder.embedding_multiplier))


def gather_rows(b: GraphBuilder, input_ids: ir.Value, rows: int, columns: int, name: str = "embedding") -> ir.Value:
    """Looks up the rows of a matrix (rows, columns) for ids (B, S)."""
    grid = b.source.grid(name)
    if grid is None:
        return b.op("Gather", b.weight(name), input_ids, axis=0)
    row_bytes = grid.row_bytes(columns)
    embedded = b.op(
        "GatherBlockQuantized",
        b.weight(f"{name}.rows", tensor=f"{name}.codes", shape=(rows, row_bytes)),
        input_ids,
        b.weight(f"{name}.row_scales", tensor=f"{name}.scales"),
        find_zero_points(b, name),
        domain=CONTRIB,
        bits=grid.bits,
        block_size=grid.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    if columns % grid.block_size == 0:
        return embedded
    # The op also returns the columns that pad the last block.
    ends = b.constant("hidden_size", [columns])
    return b.op("Slice", embedded, b.constant("index_0", [0]), ends, b.constant("axis_2", [2]))
