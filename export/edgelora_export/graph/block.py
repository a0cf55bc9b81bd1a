"""One transformer block as nodes: attention and gated MLP, around a residual sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_export.graph.nodes import CONTRIB
from edgelora_export.graph.products import multiply_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

    from edgelora_export.decoder.description import Decoder, Layer, Linear, Norm
    from edgelora_export.graph.live_inputs import LiveInputs
    from edgelora_export.graph.nodes import GraphBuilder


class Residual:
    """The sum that runs through the blocks.

    The last update stays beside it until somebody reads, so that the addition and the norm that reads it become one node.
    Where the model's sums leave fp16's range, it and its norms are float32 whatever the graph's activations are.
    cuts: the sum and the update after each addition: all that a graph that is cut there hands on (stages.py).
    """

    def __init__(self, b: GraphBuilder, decoder: Decoder, hidden: ir.Value) -> None:
        self._b = b
        self._wide = decoder.wide_residual
        self._epsilon = decoder.norm_epsilon
        self._sum = b.widen(hidden) if self._wide else hidden
        self._update: ir.Value | None = None
        self.cuts: list[tuple[ir.Value, ir.Value]] = []

    def add(self, update: ir.Value, norm: Norm | None = None) -> None:
        """Adds an activation, normalized where there is a norm."""
        if self._wide:
            update = self._b.widen(update)
        if norm is not None:
            update = normalize(self._b, update, norm, self._epsilon)
        self._sum, self._update = self.total(), update
        self.cuts.append((self._sum, update))

    def total(self) -> ir.Value:
        """The sum, all updates added."""
        if self._update is not None:
            self._sum, self._update = self._b.op("Add", self._sum, self._update), None
        return self._sum

    def normed(self, norm: Norm | None) -> ir.Value:
        """The sum as an activation, normalized; as it is where there is no norm."""
        normed = self._normed(norm)
        return self._b.narrow(normed) if self._wide else normed

    def _normed(self, norm: Norm | None) -> ir.Value:
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

    def keep(self, select: Callable[[ir.Value], ir.Value]) -> None:
        """Goes on with a selection of positions alone."""
        self._sum = select(self.total())


@dataclass(frozen=True)
class Positions:
    """What GroupQueryAttention wants to know of positions.

    last: int32 (1,), index of the last position. total: int32 scalar, positions in all.
    """

    last: ir.Value
    total: ir.Value


@dataclass(frozen=True)
class Block:
    """What a block gave beside the residual: the new cache, and the input of each product by the product's name."""

    key: ir.Value
    value: ir.Value
    taps: dict[str, ir.Value]


def add_block(
    b: GraphBuilder,
    decoder: Decoder,
    layer: Layer,
    residual: Residual,
    past: Sequence[ir.Value | None],
    positions: Positions,
    live: LiveInputs | None = None,
    select: Callable[[ir.Value], ir.Value] | None = None,
) -> Block:
    """Appends one block. past: the cache's key and value, None where there is none.

    select: after the attention, go on with these positions alone; nothing looks sideways from there.
    """
    taps: dict[str, ir.Value] = {}

    def multiply(linear: Linear, x: ir.Value) -> ir.Value:
        taps[linear.name] = x
        return multiply_linear(b, linear, x, live)

    query, key, value = _separate_heads(b, decoder, layer, multiply(layer.qkv, residual.normed(layer.attention_norm)))
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
        positions.last,
        positions.total,
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
        residual.keep(select)
    residual.add(multiply(layer.output, attended), layer.attention_post_norm)
    gate, up = b.ops("Split", multiply(layer.gate_up, residual.normed(layer.mlp_norm)), count=2, axis=-1, num_outputs=2)
    activated = b.op("Mul", activate(b, decoder.activation, gate), up)
    residual.add(multiply(layer.down, activated), layer.mlp_post_norm)
    return Block(new_key, new_value, taps)


def activate(b: GraphBuilder, kind: str, x: ir.Value) -> ir.Value:
    """The gate's activation."""
    if kind == "silu":
        return b.op("Mul", x, b.op("Sigmoid", x))
    assert kind == "gelu_pytorch_tanh"
    return b.op("Gelu", x, approximate="tanh")


def _separate_heads(
    b: GraphBuilder, decoder: Decoder, layer: Layer, packed: ir.Value
) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """What GroupQueryAttention takes: queries, keys and values in one, or apart where norms stand between."""
    if layer.query_norm is None or layer.key_norm is None:
        return packed, None, None
    kv_size = decoder.kv_heads * decoder.head_size
    sizes = b.constant("qkv.sizes", [decoder.heads * decoder.head_size, kv_size, kv_size])
    query, key, value = b.ops("Split", packed, sizes, count=3, axis=-1)
    return (
        _normalize_heads(b, decoder, layer.query_norm, query),
        _normalize_heads(b, decoder, layer.key_norm, key),
        value,
    )


def _normalize_heads(b: GraphBuilder, decoder: Decoder, norm: Norm, x: ir.Value) -> ir.Value:
    """X (1, S, heads * head_size), normalized head by head, or all heads together where the norm's weight is as wide."""
    assert norm.heads is not None
    if norm.heads.heads > 1:
        return normalize(b, x, norm, decoder.norm_epsilon)
    apart = b.op("Reshape", x, b.constant("heads.apart", [0, 0, -1, decoder.head_size]))
    normed = normalize(b, apart, norm, decoder.norm_epsilon)
    return b.op("Reshape", normed, b.constant("heads.together", [0, 0, -1]))


def normalize(b: GraphBuilder, x: ir.Value, norm: Norm, epsilon: float) -> ir.Value:
    """X over its root mean square along the last axis, times the norm's weight."""
    return b.op("SimplifiedLayerNormalization", x, b.weight(norm.name), axis=-1, epsilon=norm.epsilon(epsilon))


def multiply_linear(b: GraphBuilder, linear: Linear, x: ir.Value, live: LiveInputs | None) -> ir.Value:
    """X times a product's weight, plus its live LoRA and its bias where it has them."""
    if live is not None and linear.name in live:
        y = live.multiply(b, linear, x)
    else:
        y = multiply_matrix(b, linear.name, x, linear.columns, linear.rows)
    return b.op("Add", y, b.weight(f"{linear.name}.bias")) if linear.bias else y
