"""Describes a model to the graph builder: its sizes, its products and their checkpoint modules, and the layout of its heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

HEAD_MODULE = "lm_head"  # the checkpoint's name for the head, also where the embedding is the head
HEAD_MULTIPLE = 16  # GroupQueryAttention rotates only heads whose size is a multiple of this


@dataclass(frozen=True)
class HeadPadding:
    """The layout of heads that GroupQueryAttention takes: zeros pad each head, and each half starts with rotated entries.

    size: entries of a head in the checkpoint. padded: entries in the graph. rotary: how many of the first entries rotate, 0 in a
    value head.
    In the checkpoint the rotated entries are two halves that rotate against each other. The graph pairs the halves of the whole
    padded head. Each half of the padded head therefore holds half of the rotated entries, then half of the others, then zeros. A
    value head has its zeros at its end.
    Attention does not change as long as queries match keys, and values match the columns of the output projection.
    """

    heads: int
    size: int
    padded: int
    rotary: int

    def apply(self, array: Floats, axis: int) -> Floats:
        """Lays out an axis of length heads * size as heads * padded. Returns the array itself if nothing changes."""
        if self.size == self.padded and self.rotary in (0, self.size):
            return array
        moved = np.moveaxis(array, axis, 0)
        rest = moved.shape[1:]
        wide = np.zeros((self.heads, self.padded, *rest), array.dtype)
        wide[:, self._find_indices()] = moved.reshape(self.heads, self.size, *rest)
        return np.ascontiguousarray(np.moveaxis(wide.reshape(self.heads * self.padded, *rest), 0, axis))

    def _find_indices(self) -> NDArray[np.intp]:
        """Returns the index in the padded head of each entry of a head, (size,)."""
        if self.rotary == 0:
            return np.arange(self.size)
        rotated, unrotated = self.rotary // 2, (self.size - self.rotary) // 2
        half = self.padded // 2
        first = np.arange(rotated)
        rest = np.arange(rotated, rotated + unrotated)
        return np.concatenate([first, half + first, rest, half + rest])


@dataclass(frozen=True)
class Part:
    """One linear layer of the checkpoint, as part of a product.

    module: its name in the checkpoint, such as model.layers.0.self_attn.q_proj. out_features and in_features: as in the
    checkpoint.
    rows: the layouts of its outputs, one after the other, if they are heads. columns: the layout of its inputs, if they are
    heads.
    """

    module: str
    out_features: int
    in_features: int
    rows: tuple[HeadPadding, ...] = ()
    columns: HeadPadding | None = None

    @property
    def graph_rows(self) -> int:
        """Outputs in the graph, head padding included."""
        return sum(heads.heads * heads.padded for heads in self.rows) if self.rows else self.out_features

    @property
    def graph_columns(self) -> int:
        """Inputs in the graph, head padding included."""
        return self.in_features if self.columns is None else self.columns.heads * self.columns.padded

    def pad_rows(self, array: Floats) -> Floats:
        """Pads the output axis (the first) of a weight, a bias or a LoRA B."""
        if not self.rows:
            return array
        ends = np.cumsum([heads.heads * heads.size for heads in self.rows])[:-1]
        pieces = [heads.apply(piece, 0) for heads, piece in zip(self.rows, np.split(array, ends), strict=True)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def pad_columns(self, array: Floats) -> Floats:
        """Pads the input axis (the last) of a weight or a LoRA A."""
        return array if self.columns is None else self.columns.apply(array, array.ndim - 1)

    def find_columns(self) -> NDArray[np.intp]:
        """Finds the place in the graph of each input in the checkpoint, (in_features,)."""
        numbered = self.pad_columns(np.arange(1, self.in_features + 1, dtype=np.float32))
        place = np.flatnonzero(numbered)
        return place[np.argsort(numbered[place])]


@dataclass(frozen=True)
class Linear:
    """One matrix product of the graph. It stacks the rows of its parts, which share their input.

    name: prefix of its initializers, such as layers.0.attention.qkv. bias: True if the graph adds one. new_bias: True if a
    variant brings it, and the checkpoint stores none.
    """

    name: str
    parts: tuple[Part, ...]
    bias: bool = False
    new_bias: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(part.module for part in self.parts)

    @property
    def rows(self) -> int:
        """Outputs in the graph: those of all parts."""
        return sum(part.graph_rows for part in self.parts)

    @property
    def columns(self) -> int:
        """Inputs in the graph, shared by the parts."""
        return self.parts[0].graph_columns


@dataclass(frozen=True)
class Norm:
    """One root-mean-square norm.

    name: its initializer, such as layers.0.attention.norm. tensor: its weight in the checkpoint. offset and scale: the graph
    multiplies by (weight + offset) * scale. heads: the layout of its entries, if they are heads.
    """

    name: str
    tensor: str
    offset: float = 0.0
    scale: float = 1.0
    heads: HeadPadding | None = None

    def lay_out(self, weight: Floats) -> Floats:
        """Computes the graph's weight from the checkpoint's."""
        folded: Floats = ((weight + np.float32(self.offset)) * np.float32(self.scale * math.sqrt(self._filled))).astype(
            np.float32
        )
        return folded if self.heads is None else self.heads.apply(folded, 0)

    def epsilon(self, epsilon: float) -> float:
        """Computes the graph's epsilon from the model's."""
        return epsilon * self._filled

    @property
    def _filled(self) -> float:
        """The share of entries that are not padding.

        The graph's mean includes the padding, so it is smaller by this share f. The epsilon is multiplied by f too, and the
        weight makes up for the root: x / sqrt(mean + e) = sqrt(f) * x / sqrt(f * mean + f * e).
        """
        return 1.0 if self.heads is None else self.heads.size / self.heads.padded


@dataclass(frozen=True)
class Layer:
    """One transformer block: attention and a gated MLP, each around a residual, with a norm before it, after it, or both.

    query_norm, key_norm: over each head if their layout has one head, else over all heads together.
    rotary: the prefix of its rotary table's name, None if its heads do not rotate. query_scales: the name of the table that
    multiplies its queries by their position, None for no such table.
    window: how many positions it sees, its own included. None for all.
    """

    attention_norm: Norm | None
    qkv: Linear
    output: Linear
    mlp_norm: Norm | None
    gate_up: Linear
    down: Linear
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    rotary: str | None = "rotary"
    query_scales: str | None = None
    window: int | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.output, self.gate_up, self.down)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """Its norms, in the order of the graph."""
        before, after = (self.attention_norm, self.query_norm, self.key_norm, self.attention_post_norm), self.mlp_post_norm
        return tuple(norm for norm in (*before, self.mlp_norm, after) if norm is not None)


@dataclass(frozen=True)
class Decoder:
    """A decoder-only model.

    head_size: as in the graph, padding included. attention_scale is that of the unpadded head.
    attention_cap: scores s become cap * tanh(s / cap). logits_cap: the same for logits. None for no cap.
    rotary_tables: by initializer name, float32 (context_length, head_size / 2): <prefix>.cos and <prefix>.sin. Also the tables
    of query scales, float32 (context_length, 1).
    embedding_multiplier: scales the embedding's rows before the first block. It does not scale the head, even if that is tied.
    activation: of the MLP's gate, by its name in config.json.
    vocab_size: rows of the embedding and the head. The checkpoint may hold another number of them.
    head: the checkpoint tensor of the output projection. It is the embedding's if the checkpoint ties them.
    untied: True for a variant whose head differs from its embedding, although both start from the same tensor.
    wide_residual: True if the residual sum exceeds the range of fp16.
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
    rotary_tables: Mapping[str, Floats]
    embedding: str
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: str
    activation: str = "silu"
    embedding_multiplier: float = 1.0
    attention_cap: float | None = None
    logits_cap: float | None = None
    wide_residual: bool = False
    untied: bool = False

    @property
    def tied(self) -> bool:
        return self.head == self.embedding and not self.untied

    @property
    def vocab_tensors(self) -> dict[str, str]:
        """The checkpoint tensors of the vocabulary matrices, by product: `embedding` and, unless it is tied, `head`."""
        return {"embedding": self.embedding} if self.tied else {"embedding": self.embedding, "head": self.head}

    @property
    def vocab_modules(self) -> dict[str, str]:
        """The modules of the same matrices, as a delta names them."""
        names = {product: tensor.removesuffix(".weight") for product, tensor in self.vocab_tensors.items()}
        return names | {"head": HEAD_MODULE} if self.untied else names

    @property
    def head_product(self) -> str:
        """The name of the product that computes the logits."""
        return "embedding" if self.tied else "head"

    @property
    def linears(self) -> Iterator[Linear]:
        for layer in self.layers:
            yield from layer.linears

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All norms, in the order of the graph."""
        return (*(norm for layer in self.layers for norm in layer.norms), self.final_norm)

    @property
    def wide_norms(self) -> frozenset[str]:
        """Names of the norms that are float32 in every graph: all norms of a wide residual, except those of heads."""
        return frozenset(norm.name for norm in self.norms if norm.heads is None) if self.wide_residual else frozenset()
