"""Builds the ONNX graph of a decoder out of tensors that already lie in blobs; the graph itself stays a few hundred kB."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgelora_export.graph.block import Positions, Residual, add_block
from edgelora_export.graph.live_inputs import LiveInputs
from edgelora_export.graph.nodes import CONTRIB, BlobWeights, GraphBuilder, describe, graph_input
from edgelora_export.graph.products import multiply_matrix, packed_zeros
from edgelora_export.graph.stages import CUT
from edgelora_export.plan.targets import CPU

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.targets import Target
    from edgelora_export.weights.stored import StoredWeights

_END = np.iinfo(np.int64).max


def build_graph(
    decoder: Decoder, weights: StoredWeights, folder: Path, *, live: frozenset[str] = frozenset(), target: Target = CPU
) -> ir.Model:
    """The graph of one variant.

    weights: by initializer name, as store.py names them, in the target's type. live: names of the products that take LoRA
    inputs. Inputs and outputs are specified in docs/reference/bundle-format.md.
    """
    b = GraphBuilder(BlobWeights(weights, folder), target)
    input_ids = graph_input("input_ids", ir.DataType.INT64, (1, "S"))
    mask = graph_input("attention_mask", ir.DataType.INT64, (1, "T"))
    keep = ir.Value(
        name="logits_to_keep",
        shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.zeros(1, np.int64), name="logits_to_keep"),
    )
    positions = _read_positions(b, mask)
    inputs = LiveInputs(b, decoder, live)
    # -0 slices from the start: no positions asked for means all of them, as in transformers' logits_to_keep.
    from_end = b.op("Neg", keep)

    def last_positions(value: ir.Value) -> ir.Value:
        return b.op("Slice", value, from_end, b.constant("end", [_END]), b.constant("axis_1", [1]))

    residual = Residual(b, decoder, _embed(b, decoder, input_ids))
    caches: list[ir.Value] = []
    presents: list[ir.Value] = []
    cache_shape = (1, decoder.kv_heads, "M", decoder.head_size)
    for index, layer in enumerate(decoder.layers):
        names = [f"{index}.{kind}" for kind in ("key", "value")]
        past = [graph_input(f"past_key_values.{name}", b.float_type, cache_shape) for name in names]
        last = index + 1 == len(decoder.layers)
        block = add_block(b, decoder, layer, residual, past, positions, inputs, last_positions if last else None)
        for value, name in zip((block.key, block.value), names, strict=True):
            describe(value, f"present.{name}", b.float_type, cache_shape)
        caches += past
        presents += (block.key, block.value)
    if target is CPU:
        _name_cuts(residual, decoder.hidden_size)
    states = residual.normed(decoder.final_norm)
    logits = read_logits(b, decoder, states)
    describe(logits, "logits", ir.DataType.FLOAT, (1, "kept", decoder.vocab_size))
    describe(states, "hidden_states", b.float_type, (1, "kept", decoder.hidden_size))

    model = b.finish([input_ids, mask, *caches, keep, *inputs.inputs], [logits, *presents, states])
    for value in (keep, *inputs.inputs):  # an input that is also an initializer has that as its default
        model.graph.register_initializer(value)
    return model


def _name_cuts(residual: Residual, hidden_size: int) -> None:
    """Gives what crosses a cut a name, and the symbolic length that the runtime makes room by."""
    for index, crossing in enumerate(residual.cuts):
        kept = index >= len(residual.cuts) - 2  # the last block goes on with the positions that get logits
        for value, role in zip(crossing, ("sum", "update"), strict=True):
            describe(value, f"{CUT}.{index}.{role}", ir.DataType.FLOAT, (1, "kept" if kept else "S", hidden_size))


def read_logits(b: GraphBuilder, decoder: Decoder, states: ir.Value) -> ir.Value:
    """The head on normed states, and the logits' soft cap: float32 from there on, as samplers take them."""
    logits = b.widen(multiply_matrix(b, decoder.head_product, states, decoder.hidden_size, decoder.vocab_size))
    if decoder.logits_cap is None:
        return logits
    cap = b.scalar(decoder.logits_cap, ir.DataType.FLOAT)  # near the cap fp16 would make neighbours equal
    return b.op("Mul", b.op("Tanh", b.op("Div", logits, cap)), cap)


def _read_positions(b: GraphBuilder, mask: ir.Value) -> Positions:
    """Positions derived once from the attention mask."""
    length = b.op("ReduceSum", mask, b.constant("axis_1", [1]), keepdims=0)
    last = b.op("Cast", b.op("Sub", length, b.constant("one", [1])), to=ir.DataType.INT32)
    total = b.op("Gather", b.op("Shape", mask), b.constant("index_1", 1), axis=0)
    return Positions(last, b.op("Cast", total, to=ir.DataType.INT32))


def _embed(b: GraphBuilder, decoder: Decoder, input_ids: ir.Value) -> ir.Value:
    """The embedding's rows of the tokens, scaled where the model does so."""
    rows = gather_rows(b, input_ids, decoder.vocab_size, decoder.hidden_size)
    return rows if decoder.embedding_multiplier == 1.0 else b.op("Mul", rows, b.scalar(decoder.embedding_multiplier))


def gather_rows(b: GraphBuilder, input_ids: ir.Value, rows: int, columns: int, name: str = "embedding") -> ir.Value:
    """The rows of a matrix (rows, columns) that the ids (1, S) name."""
    grid = b.source.grid(name)
    if grid is None:
        return b.op("Gather", b.weight(name), input_ids, axis=0)
    row_bytes = grid.row_bytes(columns)
    embedded = b.op(
        "GatherBlockQuantized",
        b.weight(f"{name}.rows", tensor=f"{name}.codes", shape=(rows, row_bytes)),
        input_ids,
        b.weight(f"{name}.row_scales", tensor=f"{name}.scales"),
        packed_zeros(b, name),
        domain=CONTRIB,
        bits=grid.bits,
        block_size=grid.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    if columns % grid.block_size == 0:
        return embedded
    # The op knows nothing of the columns that fill up the last block.
    ends = b.constant("hidden_size", [columns])
    return b.op("Slice", embedded, b.constant("index_0", [0]), ends, b.constant("axis_2", [2]))
