"""Stores a decoder's weights as blobs: once for the base, and again only what a variant's delta touches."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.quantize.int4 import BlockQuantized, Grid, quantize_rtn, stack_rows
from edgelora_export.weights.blobs import StoredTensor, read_stored, write_blob
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora_export.decoder.description import Decoder, Linear, Norm, Part
    from edgelora_export.plan.variants import Delta, Quantization
    from edgelora_export.weights.base import Base

    Floats = NDArray[np.float32]

_ROWS = 8192  # of a matrix read at once


@dataclass
class Weights:
    """Where a variant's tensors lie, by initializer name, and the grid of each quantized product, by its name."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)

    def __or__(self, other: Weights) -> Weights:
        return Weights(self.tensors | other.tensors, self.grids | other.grids)

    @property
    def blobs(self) -> set[str]:
        """Names of the files that hold them."""
        return {tensor.location for tensor in self.tensors.values()}

    def only(self, product: str) -> Weights:
        """What belongs to one product."""
        tensors = {name: tensor for name, tensor in self.tensors.items() if name == product or name.startswith(f"{product}.")}
        return Weights(tensors, {name: grid for name, grid in self.grids.items() if name == product})

    def take(self, other: Weights) -> None:
        """Adds the other's, in place of one's own where names agree."""
        self.tensors.update(other.tensors)
        self.grids.update(other.grids)


def store_norms(base: Base, decoder: Decoder, folder: Path) -> Weights:
    """Norms, biases and rotary tables, which all variants share."""
    tensors = write_blob(folder, {norm.name: read_norm(base, norm) for norm in decoder.norms})
    tensors |= write_blob(folder, dict(decoder.rotary_tables))
    biases = {f"{linear.name}.bias": read_bias(base, linear) for linear in decoder.linears if linear.bias}
    return Weights(tensors | (write_blob(folder, biases) if biases else {}))


def read_linear(base: Base, linear: Linear, delta: Delta | None) -> Floats:
    """One product's weight (N, K), with a delta added where it has one for a part; shapes are checked by check_delta."""
    return np.concatenate([part.pad_columns(part.pad_rows(read_part(base, part, delta))) for part in linear.parts])


def read_part(base: Base, part: Part, delta: Delta | None) -> Floats:
    """One part's weight (N, K) as the checkpoint lays it out, with a delta added where it has one for it."""
    weight = base.tensor(f"{part.module}.weight")
    if weight.shape != (part.out_features, part.in_features):
        raise InputError(
            f"{part.module}.weight has shape {weight.shape}; config.json means {(part.out_features, part.in_features)}"
        )
    return weight + delta.dense(part.module, weight) if delta is not None and part.module in delta.modules else weight


def read_rows(base: Base, name: str, rows: NDArray[np.int64]) -> Floats:
    """Rows (R, K) of a matrix of the base, in ascending order, without holding the matrix."""
    chunks = [
        base.rows(name, int(first), int(last) + 1)[chunk - first]
        for chunk in np.split(rows, np.flatnonzero(np.diff(rows // _ROWS)) + 1)
        for first, last in [(chunk[0], chunk[-1])]
    ]
    return np.concatenate(chunks)


def read_bias(base: Base, linear: Linear) -> Floats:
    """One product's bias (N,)."""
    return np.concatenate([part.pad_rows(base.tensor(f"{part.module}.bias")) for part in linear.parts])


def read_norm(base: Base, norm: Norm) -> Floats:
    """One norm's weight as the graph multiplies with it."""
    return norm.lay_out(base.tensor(norm.tensor))


def store_ends(base: Base, decoder: Decoder, delta: Delta | None, folder: Path, quantization: Quantization) -> Weights:
    """The embedding, and the head where it is not the same tensor, with a delta added, rounded to nearest."""
    weights = Weights()
    for name in end_modules(decoder):
        weights.take(store_end(base, decoder, name, delta, folder, quantization.grid(name)))
    return weights


def store_end(base: Base, decoder: Decoder, name: str, delta: Delta | None, folder: Path, grid: Grid | None) -> Weights:
    """The `embedding` or the `head` with a delta added, rounded to nearest a part at a time, or as it is without a grid."""
    if grid is None:
        return Weights(write_blob(folder, {name: read_end(base, decoder, name, delta)}))
    parts = [quantize_rtn(rows, **asdict(grid)) for rows in read_end_rows(base, decoder, name, delta)]
    return store_matrix(folder, name, stack_rows(parts))


def read_end_rows(base: Base, decoder: Decoder, name: str, delta: Delta | None) -> Iterator[Floats]:
    """The weight (V, H) of the `embedding` or the `head`, with a delta added where it has one for it, some rows at a time."""
    if touches_ends(delta, decoder):
        yield read_end(base, decoder, name, delta)
        return
    for start in range(0, decoder.vocab_size, _ROWS):
        yield base.rows(f"{end_modules(decoder)[name]}.weight", start, min(start + _ROWS, decoder.vocab_size))


def read_end(base: Base, decoder: Decoder, name: str, delta: Delta | None) -> Floats:
    """The whole weight (V, H) of the `embedding` or the `head`, with a delta added where it has one for it."""
    module = end_modules(decoder)[name]
    weight = base.tensor(f"{module}.weight")
    return weight + delta.dense(module, weight) if delta is not None and module in delta.modules else weight


def touches_ends(delta: Delta | None, decoder: Decoder) -> bool:
    """Whether a delta changes the embedding or the head."""
    return delta is not None and not delta.modules.isdisjoint(end_modules(decoder).values())


def end_modules(decoder: Decoder) -> dict[str, str]:
    """Checkpoint modules of the embedding and, unless tied to it, of the head."""
    ends = {"embedding": decoder.embedding} if decoder.tied else {"embedding": decoder.embedding, "head": decoder.head}
    return {name: tensor.removesuffix(".weight") for name, tensor in ends.items()}


def touches(delta: Delta | None, linear: Linear) -> bool:
    """Whether a delta changes any part of a product."""
    return delta is not None and not delta.modules.isdisjoint(linear.modules)


def check_modules(decoder: Decoder, modules: Iterable[str], owner: str, *, ends: bool = False) -> None:
    """Refuses modules that are no linear layer of the decoder, nor, with `ends`, its embedding or head, in one message."""
    known = {module for linear in decoder.linears for module in linear.modules}
    if ends:
        tied = set(modules) & {end_modules(decoder)["embedding"], "lm_head"}
        if decoder.tied and tied:
            raise InputError(
                f"{owner} changes {', '.join(sorted(tied))}, and this base ties its head to its embedding: whether one or both "
                "should change is not known; untie them (tie_word_embeddings) and train the adapter on that base"
            )
        known |= set(end_modules(decoder).values())
    if unknown := sorted(set(modules) - known):
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise InputError(f"{owner} changes {shown}, which are no linear layers of this {decoder.architecture} decoder")


def store_rounded(folder: Path, name: str, weight: Floats, grid: Grid | None) -> Weights:
    """Stores a weight (N, K) rounded to nearest on a grid, or as it is where there is none."""
    if grid is None:
        return Weights(write_blob(folder, {name: weight}))
    return store_matrix(folder, name, quantize_rtn(weight, **asdict(grid)))


def store_matrix(folder: Path, name: str, matrix: BlockQuantized) -> Weights:
    """Stores a quantized weight as codes, scales and zero points under its name."""
    tensors: dict[str, NDArray[Any]] = {f"{name}.codes": matrix.codes, f"{name}.scales": matrix.scales}
    if matrix.zero_points is not None:
        tensors[f"{name}.zero_points"] = matrix.zero_points
    return Weights(write_blob(folder, tensors), {name: matrix.grid})


def load_matrix(folder: Path, name: str, weights: Weights, columns: int) -> BlockQuantized | Floats:
    """What was stored of a product: inverse of store_matrix, or the float32 (N, columns) weight where it is not quantized."""
    grid = weights.grids.get(name)
    if grid is None:
        return read_stored(folder, weights.tensors[name])
    zeros = weights.tensors.get(f"{name}.zero_points")
    return BlockQuantized(
        read_stored(folder, weights.tensors[f"{name}.codes"]),
        read_stored(folder, weights.tensors[f"{name}.scales"]),
        None if zeros is None else read_stored(folder, zeros),
        grid.bits,
        grid.block_size,
        columns,
    )
