"""What the graph builder needs to know of a model: sizes, which checkpoint modules feed which product, how heads are laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

HEAD_MULTIPLE = 16  # GroupQueryAttention rotates only heads whose size is a multiple of this


@dataclass(frozen=True)
class HeadPadding:
    """Widens each head with zeros to a size that GroupQueryAttention takes; attention is unchanged by it.

    A rotary head is two halves that turn against each other, so its zeros go behind each half; a value head gets them
    at its end.
    """

    heads: int
    size: int
    padded: int
    rotary: bool

    def apply(self, array: Floats, axis: int) -> Floats:
        """Pads the axis that is (heads * size) long to (heads * padded); the identity where the sizes agree."""
        if self.size == self.padded:
            return array
        moved = np.moveaxis(array, axis, 0)
        rest = moved.shape[1:]
        parts = 2 if self.rotary else 1
        halves = moved.reshape(self.heads, parts, self.size // parts, *rest)
        wide = np.zeros((self.heads, parts, self.padded // parts, *rest), array.dtype)
        wide[:, :, : self.size // parts] = halves
        return np.ascontiguousarray(np.moveaxis(wide.reshape(self.heads * self.padded, *rest), 0, axis))


@dataclass(frozen=True)
class Part:
    """One linear layer of the checkpoint, as it enters a product.

    module: its name there, e.g. model.layers.0.self_attn.q_proj. out_features and in_features: as in the checkpoint.
    """

    module: str
    out_features: int
    in_features: int
    rows: HeadPadding | None = None
    columns: HeadPadding | None = None

    @property
    def graph_rows(self) -> int:
        """Outputs in the graph, head padding included."""
        return self.out_features if self.rows is None else self.rows.heads * self.rows.padded

    @property
    def graph_columns(self) -> int:
        """Inputs in the graph, head padding included."""
        return self.in_features if self.columns is None else self.columns.heads * self.columns.padded

    def pad_rows(self, array: Floats) -> Floats:
        """Pads the output axis (the first) of a weight, a bias or a LoRA B."""
        return array if self.rows is None else self.rows.apply(array, 0)

    def pad_columns(self, array: Floats) -> Floats:
        """Pads the input axis (the last) of a weight or a LoRA A."""
        return array if self.columns is None else self.columns.apply(array, array.ndim - 1)


@dataclass(frozen=True)
class Linear:
    """One matrix product of the graph: the stacked rows of its parts, which share their input.

    name: the initializers' prefix, e.g. layers.0.attention.qkv.
    """

    name: str
    parts: tuple[Part, ...]
    bias: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(part.module for part in self.parts)

    @property
    def rows(self) -> int:
        """Outputs in the graph: those of all parts."""
        return sum(part.graph_rows for part in self.parts)

    @property
    def columns(self) -> int:
        """Inputs in the graph, which the parts share."""
        return self.parts[0].graph_columns


@dataclass(frozen=True)
class Norm:
    """One root-mean-square norm. name: the initializer, e.g. layers.0.attention.norm. tensor: its weight in the checkpoint."""

    name: str
    tensor: str


@dataclass(frozen=True)
class Layer:
    """One transformer block: pre-norm attention and pre-norm gated MLP, each around a residual."""

    attention_norm: Norm
    qkv: Linear
    output: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.output, self.gate_up, self.down)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All norms, in the order of the graph."""
        return (self.attention_norm, self.mlp_norm)


@dataclass(frozen=True)
class Decoder:
    """A decoder-only model.

    head_size: as the graph has it (padded); attention_scale belongs to the unpadded one.
    rotary_cos, rotary_sin: float32 (context_length, head_size / 2).
    head: the checkpoint tensor of the output projection; the embedding's own where they are tied.
    """

    architecture: str
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    attention_scale: float
    norm_epsilon: float
    vocab_size: int
    context_length: int
    rotary_cos: Floats
    rotary_sin: Floats
    embedding: str
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: str

    @property
    def tied(self) -> bool:
        return self.head == self.embedding

    @property
    def linears(self) -> Iterator[Linear]:
        for layer in self.layers:
            yield from layer.linears

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All norms, in the order of the graph."""
        return (*(norm for layer in self.layers for norm in layer.norms), self.final_norm)
