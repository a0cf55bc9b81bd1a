"""Builds the ONNX graph of a decoder out of tensors that already lie in blobs; the graph itself stays a few hundred kB."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgelora_export.live import live_slots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgelora_export.blobs import StoredTensor
    from edgelora_export.decoder import Decoder, Layer, Linear

OPSET = 21
CONTRIB = "com.microsoft"
INT32_ACTIVATIONS = 4  # MatMulNBits accuracy_level: activations rounded to int8, the only fast CPU path
_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Grid:
    """How the codes of quantized products lie; None in its place means float32 weights."""

    bits: int
    block_size: int


class GraphBuilder:
    """Appends nodes to one graph. Initializers come from `tensors` by name, and each name enters the graph once."""

    def __init__(self, tensors: Mapping[str, StoredTensor], folder: Path) -> None:
        self._tape = ir.tape.Tape()
        self._tensors = tensors
        self._folder = folder
        self._loaded: dict[str, ir.Value] = {}

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: int | float | Sequence[int]) -> ir.Value:
        return self._tape.op(kind, inputs, attributes, domain=domain)

    def ops(
        self, kind: str, *inputs: ir.Value | None, count: int, domain: str = "", **attributes: int | float
    ) -> Sequence[ir.Value]:
        return self._tape.op_multi_out(kind, inputs, attributes, num_outputs=count, domain=domain)

    def constant(self, name: str, values: int | list[int]) -> ir.Value:
        """An int64 initializer held in the graph."""
        if name not in self._loaded:
            self._loaded[name] = self._tape.initializer(ir.tensor(np.array(values, np.int64), name=name))
        return self._loaded[name]

    def weight(self, name: str, *, tensor: str | None = None, shape: tuple[int, ...] | None = None) -> ir.Value:
        """An initializer in a blob. `tensor` and `shape` let two initializers see the same bytes in two shapes."""
        if name not in self._loaded:
            stored = self._tensors[tensor or name]
            external = ir.ExternalTensor(
                stored.location,
                stored.offset,
                stored.length,
                ir.DataType.from_numpy(stored.dtype),
                shape=ir.Shape(stored.shape if shape is None else shape),
                name=name,
                base_dir=self._folder,
            )
            self._loaded[name] = self._tape.initializer(external)
        return self._loaded[name]

    def has(self, tensor: str) -> bool:
        return tensor in self._tensors

    def stored(self, tensor: str) -> StoredTensor:
        return self._tensors[tensor]

    def finish(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        initializers = [*self._tape.initializers]
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self._tape.nodes,
            initializers=initializers,
            opset_imports={"": OPSET, CONTRIB: 1},
            name="decoder",
        )
        return ir.Model(graph, ir_version=10, producer_name="edgelora")


class _LoraInputs:
    """The A and B inputs of the products that take live adapters; rank 0, and so no effect, where none is bound."""

    def __init__(self, decoder: Decoder, live: frozenset[str]) -> None:
        self._a: dict[str, ir.Value] = {}
        self._b: dict[str, list[ir.Value]] = {}
        for linear in decoder.linears:
            if linear.name in live:
                slots = live_slots(linear)
                count = len(linear.parts)
                # Each product has a rank of its own: onnxruntime lets tensors whose symbolic shapes agree share a buffer.
                rank = f"{linear.name}.R"
                self._a[linear.name] = _input_of_rank_0(slots.a, (linear.columns, f"{count} {rank}" if count > 1 else rank))
                self._b[linear.name] = [
                    _input_of_rank_0(name, (rank, part.graph_rows)) for name, part in zip(slots.b, linear.parts, strict=True)
                ]

    def __contains__(self, name: str) -> bool:
        return name in self._a

    @property
    def inputs(self) -> list[ir.Value]:
        return [value for name, a in self._a.items() for value in (a, *self._b[name])]

    def add(self, b: GraphBuilder, linear: Linear, x: ir.Value, y: ir.Value) -> ir.Value:
        """Y + x·A·B, one A for all the parts, one B for each."""
        count = len(linear.parts)
        down = b.op("MatMul", x, self._a[linear.name])
        downs = b.ops("Split", down, count=count, axis=-1, num_outputs=count) if count > 1 else [down]
        ups = [b.op("MatMul", part, up) for part, up in zip(downs, self._b[linear.name], strict=True)]
        return b.op("Add", y, b.op("Concat", *ups, axis=-1) if count > 1 else ups[0])


def build_graph(
    decoder: Decoder,
    tensors: Mapping[str, StoredTensor],
    folder: Path,
    *,
    grid: Grid | None,
    live: frozenset[str] = frozenset(),
) -> ir.Model:
    """The graph of one variant.

    tensors: by initializer name, as store.py names them. live: names of the products that take LoRA inputs.
    Inputs and outputs are specified in docs/bundle-format.md.
    """
    b = GraphBuilder(tensors, folder)
    inputs = [_input("input_ids", ir.DataType.INT64, (1, "S")), _input("attention_mask", ir.DataType.INT64, (1, "T"))]
    keep = ir.Value(
        name="logits_to_keep",
        shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.zeros(1, np.int64), name="logits_to_keep"),
    )
    position = _Positions.build(b, inputs[1], decoder)
    lora = _LoraInputs(decoder, live)

    hidden = _embed(b, decoder, inputs[0], grid)
    normed = b.op(
        "SimplifiedLayerNormalization",
        hidden,
        b.weight(decoder.layers[0].attention_norm),
        axis=-1,
        epsilon=decoder.norm_epsilon,
    )
    # -0 slices from the start: no positions asked for means all of them, as in transformers' logits_to_keep.
    from_end = b.op("Neg", keep)
    caches: list[ir.Value] = []
    presents: list[ir.Value] = []
    for index, layer in enumerate(decoder.layers):
        past = [_input(f"past_key_values.{index}.{kind}", ir.DataType.FLOAT, _cache_shape(decoder)) for kind in ("key", "value")]
        caches += past
        attended, *present = _attend(b, decoder, layer, normed, past, position, grid, lora)
        for value, kind in zip(present, ("key", "value"), strict=True):
            _describe(value, f"present.{index}.{kind}", ir.DataType.FLOAT, _cache_shape(decoder))
        presents += present
        last = index + 1 == len(decoder.layers)
        if last:  # past the last attention nothing looks sideways: go on with the wanted positions alone
            attended, hidden = (_last_positions(b, value, from_end) for value in (attended, hidden))
        projected = _multiply(b, layer.output, attended, grid, lora)
        normed, hidden = _add_and_norm(b, hidden, projected, layer.mlp_norm, decoder)
        gate, up = b.ops("Split", _multiply(b, layer.gate_up, normed, grid, lora), count=2, axis=-1, num_outputs=2)
        activated = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
        projected = _multiply(b, layer.down, activated, grid, lora)
        next_norm = decoder.final_norm if last else decoder.layers[index + 1].attention_norm
        normed, hidden = _add_and_norm(b, hidden, projected, next_norm, decoder)
    head = "embedding" if decoder.tied else "head"
    logits = _product(b, head, normed, decoder.hidden_size, decoder.vocab_size, grid)
    _describe(logits, "logits", ir.DataType.FLOAT, (1, "kept", decoder.vocab_size))

    model = b.finish([*inputs, *caches, keep, *lora.inputs], [logits, *presents])
    for value in (keep, *lora.inputs):  # an input that is also an initializer has that as its default
        model.graph.register_initializer(value)
    return model


def _input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _input_of_rank_0(name: str, shape: tuple[int | str, int | str]) -> ir.Value:
    """A matrix input whose symbolic axis, the rank, is 0 long by default."""
    empty = np.zeros([size if isinstance(size, int) else 0 for size in shape], np.float32)
    value = _input(name, ir.DataType.FLOAT, shape)
    value.const_value = ir.tensor(empty, name=name)
    return value


def _describe(value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
    value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)


def _cache_shape(decoder: Decoder) -> tuple[int | str, ...]:
    return (1, decoder.kv_heads, "M", decoder.head_size)


@dataclass(frozen=True)
class _Positions:
    """What GroupQueryAttention wants to know of positions, derived once from the attention mask."""

    last: ir.Value  # int32 (1,): index of the last position
    total: ir.Value  # int32 scalar: positions in all
    cos: ir.Value
    sin: ir.Value

    @classmethod
    def build(cls, b: GraphBuilder, mask: ir.Value, decoder: Decoder) -> _Positions:
        length = b.op("ReduceSum", mask, b.constant("axis_1", [1]), keepdims=0)
        last = b.op("Cast", b.op("Sub", length, b.constant("one", [1])), to=ir.DataType.INT32)
        total = b.op("Gather", b.op("Shape", mask), b.constant("index_1", 1), axis=0)
        half = (decoder.context_length, decoder.head_size // 2)
        return cls(
            last,
            b.op("Cast", total, to=ir.DataType.INT32),
            b.weight("rotary.cos", shape=half),
            b.weight("rotary.sin", shape=half),
        )


def _embed(b: GraphBuilder, decoder: Decoder, input_ids: ir.Value, grid: Grid | None) -> ir.Value:
    if grid is None:
        return b.op("Gather", b.weight("embedding"), input_ids, axis=0)
    rows = decoder.vocab_size
    row_bytes = b.stored("embedding.codes").length // rows
    embedded = b.op(
        "GatherBlockQuantized",
        b.weight("embedding.rows", tensor="embedding.codes", shape=(rows, row_bytes)),
        input_ids,
        b.weight("embedding.row_scales", tensor="embedding.scales"),
        _packed_zeros(b, "embedding"),
        domain=CONTRIB,
        bits=grid.bits,
        block_size=grid.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    if decoder.hidden_size % grid.block_size == 0:
        return embedded
    # The op knows nothing of the columns that fill up the last block.
    ends = b.constant("hidden_size", [decoder.hidden_size])
    return b.op("Slice", embedded, b.constant("index_0", [0]), ends, b.constant("axis_2", [2]))


def _packed_zeros(b: GraphBuilder, name: str) -> ir.Value | None:
    zeros = f"{name}.zero_points"
    return b.weight(zeros) if b.has(zeros) else None


def _attend(
    b: GraphBuilder,
    decoder: Decoder,
    layer: Layer,
    normed: ir.Value,
    past: Sequence[ir.Value],
    position: _Positions,
    grid: Grid | None,
    lora: _LoraInputs,
) -> Sequence[ir.Value]:
    """(attended (1, S, heads * head_size), present key, present value); q, k and v travel packed in one tensor."""
    packed = _multiply(b, layer.qkv, normed, grid, lora)
    return b.ops(
        "GroupQueryAttention",
        packed,
        None,
        None,
        *past,
        position.last,
        position.total,
        position.cos,
        position.sin,
        count=3,
        domain=CONTRIB,
        num_heads=decoder.heads,
        kv_num_heads=decoder.kv_heads,
        do_rotary=1,
        scale=decoder.attention_scale,
    )


def _last_positions(b: GraphBuilder, value: ir.Value, from_end: ir.Value) -> ir.Value:
    return b.op("Slice", value, from_end, b.constant("end", [_END]), b.constant("axis_1", [1]))


def _add_and_norm(b: GraphBuilder, hidden: ir.Value, update: ir.Value, norm: str, decoder: Decoder) -> tuple[ir.Value, ir.Value]:
    """(normed sum, sum)."""
    normed, _, _, total = b.ops(
        "SkipSimplifiedLayerNormalization",
        hidden,
        update,
        b.weight(norm),
        count=4,
        domain=CONTRIB,
        epsilon=decoder.norm_epsilon,
    )
    return normed, total


def _multiply(b: GraphBuilder, linear: Linear, x: ir.Value, grid: Grid | None, lora: _LoraInputs) -> ir.Value:
    """X times a product's weight, plus its bias and its live LoRA where it has them."""
    y = _product(b, linear.name, x, linear.columns, linear.rows, grid)
    if linear.bias:
        y = b.op("Add", y, b.weight(f"{linear.name}.bias"))
    return lora.add(b, linear, x, y) if linear.name in lora else y


def _product(b: GraphBuilder, name: str, x: ir.Value, columns: int, rows: int, grid: Grid | None) -> ir.Value:
    if grid is None:
        return b.op("FusedMatMul", x, b.weight(name), domain=CONTRIB, transB=1)
    codes = b.weight(f"{name}.codes")
    return b.op(
        "MatMulNBits",
        x,
        codes,
        b.weight(f"{name}.scales"),
        _packed_zeros(b, name),
        domain=CONTRIB,
        K=columns,
        N=rows,
        bits=grid.bits,
        block_size=grid.block_size,
        accuracy_level=INT32_ACTIVATIONS,
    )
