"""Builds transformer blocks out of nodes: attention and a gated MLP around a residual sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from edgelora_export.graph.nodes import CONTRIB
from edgelora_export.graph.products import multiply_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgelora_export.decoder.description import Decoder, Layer, Linear, Norm
    from edgelora_export.graph.live_inputs import LiveInputs
    from edgelora_export.graph.nodes import GraphBuilder


class Residual:
    """The sum that runs through the blocks.

    The latest update stays pending until the next read, so that its addition and the norm that reads it become one node.
    If the sums of a model exceed the range of fp16, the sum and its norms are float32, whatever type the activations have.
    cuts: the sum and the pending update after each addition. A graph that is cut there passes on nothing else (stages.py).
    """

    def __init__(self, b: GraphBuilder, decoder: Decoder, hidden: ir.Value) -> None:
        self._b = b
        self._wide = decoder.wide_residual
        self._epsilon = decoder.norm_epsilon
        self._sum = b.widen(hidden) if self._wide else hidden
        self._update: ir.Value | None = None
        self.cuts: list[tuple[ir.Value, ir.Value]] = []

    def add(self, update: ir.Value, norm: Norm | None = None) -> None:
        """Adds an activation, normalized if a norm is given."""
        if self._wide:
            update = self._b.widen(update)
        if norm is not None:
            update = normalize(self._b, update, norm, self._epsilon)
        self._sum, self._update = self.total(), update
        self.cuts.append((self._sum, update))

    def total(self) -> ir.Value:
        """Returns the sum with all updates added."""
        if self._update is not None:
            self._sum, self._update = self._b.op("Add", self._sum, self._update), None
        return self._sum

    def read(self, norm: Norm | None) -> ir.Value:
        """Returns the sum as an activation, normalized if a norm is given."""
        normed = self._normalize(norm)
        return self._b.narrow(normed) if self._wide else normed

    def _normalize(self, norm: Norm | None) -> ir.Value:
        if norm is None:
            return self.total()
        if self._update is None:
            return normalize(self._b, self._sum, norm, self._epsilon)
        normed, _, _, self._sum = self._b.ops(
            "SkipSimplifiedLayerNormalization",
            self._sum,
            self._update,
            self._b.weight(norm.name),
            count=4,
            domain=CONTRIB,
            epsilon=norm.epsilon(self._epsilon),
        )
        self._update = None
        return normed

    def select(self, select: Callable[[ir.Value], ir.Value]) -> None:
        """Replaces the sum with some of its positions."""
        self._sum = select(self.total())


@dataclass(frozen=True)
class Positions:
    """The inputs of GroupQueryAttention that give the positions.

    last: int32 (B,), index of each text's last position. total: int32 scalar, number of positions of the longest text.
    """

    last: ir.Value
    total: ir.Value


@dataclass(frozen=True)
class BlockOutput:
    """The outputs of a block besides the residual.

    key, value: the new cache. taps: the input of each product, by the product's name.
    """

    key: ir.Value
    value: ir.Value
    taps: dict[str, ir.Value]


class BlockBuilder:
    """Appends the blocks of one decoder to one graph.

    hidden: the residual (B, S, H) that enters the first block. live: the inputs of live adapters, None for a graph without.
    """

    def __init__(
        self, b: GraphBuilder, decoder: Decoder, hidden: ir.Value, positions: Positions, live: LiveInputs | None = None
    ) -> None:
        self._b = b
        self._decoder = decoder
        self._positions = positions
        self._live = live
        self.residual = Residual(b, decoder, hidden)

    def append(
        self, layer: Layer, past: Sequence[ir.Value | None], select: Callable[[ir.Value], ir.Value] | None = None
    ) -> BlockOutput:
        """Appends one block.

        Requires: `residual` holds the sum that enters this block.
        Ensures: `residual` holds the sum after this block.

        past: the cache's key and value, None where there is no cache. select: picks the positions that continue after the
        attention. No later node looks at other positions.
        """
        b, decoder, residual = self._b, self._decoder, self.residual
        taps: dict[str, ir.Value] = {}

        def multiply(linear: Linear, x: ir.Value) -> ir.Value:
            taps[linear.name] = x
            return multiply_linear(b, linear, x, self._live)

        query, key, value = self._separate_heads(layer, multiply(layer.qkv, residual.read(layer.attention_norm)))
        settings: dict[str, float] = {}
        if layer.window is not None:
            settings["local_window_size"] = layer.window
        if decoder.attention_cap is not None:
            settings["softcap"] = decoder.attention_cap
        attended, new_key, new_value = b.ops(
            "GroupQueryAttention",
            query,
            key,
            value,
            *past,
            self._positions.last,
            self._positions.total,
            *(() if layer.rotary is None else (b.weight(f"{layer.rotary}.cos"), b.weight(f"{layer.rotary}.sin"))),
            count=3,
            domain=CONTRIB,
            num_heads=decoder.heads,
            kv_num_heads=decoder.kv_heads,
            do_rotary=int(layer.rotary is not None),
            scale=decoder.attention_scale,
            **settings,
        )
        if select is not None:
            attended = select(attended)
            residual.select(select)
        residual.add(multiply(layer.output, attended), layer.attention_post_norm)
        gate, up = b.ops("Split", multiply(layer.gate_up, residual.read(layer.mlp_norm)), count=2, axis=-1, num_outputs=2)
        activated = b.op("Mul", activate(b, decoder.activation, gate), up)
        residual.add(multiply(layer.down, activated), layer.mlp_post_norm)
        return BlockOutput(new_key, new_value, taps)

    def _separate_heads(self, layer: Layer, packed: ir.Value) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """Splits queries, keys and values if they have norms or scales. Else GroupQueryAttention takes them packed."""
        if layer.query_norm is None and layer.key_norm is None and layer.query_scales is None:
            return packed, None, None
        heads, kv_heads, head_size = self._decoder.heads, self._decoder.kv_heads, self._decoder.head_size
        sizes = self._b.constant("qkv.sizes", [heads * head_size, kv_heads * head_size, kv_heads * head_size])
        query, key, value = self._b.ops("Split", packed, sizes, count=3, axis=-1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = self._normalize_heads(layer.query_norm, query), self._normalize_heads(layer.key_norm, key)
        if layer.query_scales is not None:
            query = self._scale_queries(layer.query_scales, query)
        return query, key, value

    def _scale_queries(self, table: str, query: ir.Value) -> ir.Value:
        """Multiplies each query of (B, S, heads * head_size) by its position's entry in a table (C, 1)."""
        b = self._b
        zero, one = b.constant("scalar_0", 0), b.constant("scalar_1", 1)
        count = b.op("Gather", b.op("Shape", query), one, axis=0)
        last = b.op("Unsqueeze", b.op("Cast", self._positions.last, to=ir.DataType.INT64), b.constant("axis_1", [1]))
        first = b.op("Sub", b.op("Add", last, one), count)  # (B, 1)
        positions = b.op("Add", first, b.op("Range", zero, count, one))
        return b.op("Mul", query, b.op("Gather", b.weight(table), positions, axis=0))

    def _normalize_heads(self, norm: Norm, x: ir.Value) -> ir.Value:
        """Normalizes x (B, S, heads * head_size): head by head, or all heads together if the norm's weight spans them."""
        b, epsilon = self._b, self._decoder.norm_epsilon
        assert norm.heads is not None
        if norm.heads.heads > 1:
            return normalize(b, x, norm, epsilon)
        apart = b.op("Reshape", x, b.constant("heads.apart", [0, 0, -1, self._decoder.head_size]))
        normed = normalize(b, apart, norm, epsilon)
        return b.op("Reshape", normed, b.constant("heads.together", [0, 0, -1]))


def activate(b: GraphBuilder, activation: str, x: ir.Value) -> ir.Value:
    """Applies an activation function, named as in config.json."""
    if activation == "silu":
        return b.op("Mul", x, b.op("Sigmoid", x))
    assert activation == "gelu_pytorch_tanh"
    return b.op("Gelu", x, approximate="tanh")


def normalize(b: GraphBuilder, x: ir.Value, norm: Norm, epsilon: float) -> ir.Value:
    """Divides x by its root mean square along the last axis and multiplies it by the norm's weight."""
    return b.op("SimplifiedLayerNormalization", x, b.weight(norm.name), axis=-1, epsilon=norm.epsilon(epsilon))


def multiply_linear(b: GraphBuilder, linear: Linear, x: ir.Value, live: LiveInputs | None) -> ir.Value:
    """Multiplies x by a product's weight, and adds its live LoRA and its bias if it has them."""
    if live is not None and linear.name in live:
        y = live.multiply(b, linear, x)
    else:
        y = multiply_matrix(b, linear.name, x, linear.columns, linear.rows)
    return b.op("Add", y, b.weight(f"{linear.name}.bias")) if linear.bias else y
