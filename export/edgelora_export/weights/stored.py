"""Stores weights in a bundle's blobs, quantized or in float32, and loads them back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from edgelora_export.quantize.int4 import BlockQuantized, Grid, quantize_rtn, stack_rows
from edgelora_export.weights.blobs import StoredTensor, read_stored, write_blob
from edgelora_export.weights.merged import changes_bias, iterate_vocab_rows, read_bias, read_norm, read_vocab_matrix

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from edgelora_export.base.base import Base
    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.variants import Delta, Quantization

    Floats = NDArray[np.float32]

_KINDS = ("codes", "scales", "zero_points")  # tensors of a quantized matrix


@dataclass(frozen=True)
class Storage:
    """The source and the destination of weights: the base, its decoder's layout, the folder of blobs, and the quantization."""

    base: Base
    decoder: Decoder
    folder: Path
    quantization: Quantization


@dataclass
class StoredWeights:
    """The places of a variant's tensors, by initializer name, and the grid of each quantized product, by its name."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)

    def __or__(self, other: StoredWeights) -> StoredWeights:
        return StoredWeights(self.tensors | other.tensors, self.grids | other.grids)

    def select(self, product: str) -> StoredWeights:
        """Returns the matrix of one product: its tensors, without the bias, and its grid."""
        names = (product, *(f"{product}.{kind}" for kind in _KINDS))
        tensors = {name: self.tensors[name] for name in names if name in self.tensors}
        return StoredWeights(tensors, {name: grid for name, grid in self.grids.items() if name == product})

    def rename(self, product: str, name: str) -> StoredWeights:
        """Returns the matrix of one product under another name, in the same bytes."""
        chosen = self.select(product)
        tensors = {name + each.removeprefix(product): tensor for each, tensor in chosen.tensors.items()}
        grid = chosen.grids.get(product)
        return StoredWeights(tensors, {} if grid is None else {name: grid})

    def update(self, other: StoredWeights) -> None:
        """Adds the other's tensors and grids, which replace those of the same name."""
        self.tensors.update(other.tensors)
        self.grids.update(other.grids)


def store_norms(storage: Storage) -> StoredWeights:
    """Stores norms, biases and rotary tables, which all variants share."""
    base, decoder, folder = storage.base, storage.decoder, storage.folder
    tensors = write_blob(folder, {norm.name: read_norm(base, norm) for norm in decoder.norms})
    tensors |= write_blob(folder, dict(decoder.rotary_tables))
    biases = {f"{linear.name}.bias": read_bias(base, linear) for linear in decoder.linears if linear.bias}
    return StoredWeights(tensors | (write_blob(folder, biases) if biases else {}))


def store_biases(storage: Storage, delta: Delta | None) -> StoredWeights:
    """Stores the biases that a delta changes or adds. storage: with a decoder that is adapted to the delta."""
    changed = [linear for linear in storage.decoder.linears if changes_bias(delta, linear)]
    biases = {f"{linear.name}.bias": read_bias(storage.base, linear, delta) for linear in changed}
    return StoredWeights(write_blob(storage.folder, biases) if biases else {})


def store_vocab_matrix(storage: Storage, name: str, delta: Delta | None, grid: Grid | None) -> StoredWeights:
    """Stores the `embedding` or the `head` with a delta added: rounded to nearest, or in float32 without a grid.

    storage: with a decoder that is adapted to the delta.
    """
    base, decoder = storage.base, storage.decoder
    if grid is None:
        return StoredWeights(write_blob(storage.folder, {name: read_vocab_matrix(base, decoder, name, delta)}))
    parts = (quantize_rtn(rows, **asdict(grid)) for rows in iterate_vocab_rows(base, decoder, name, delta))
    return store_matrix(storage.folder, name, stack_rows(parts, decoder.vocab_size))


def store_rounded(folder: Path, name: str, weight: Floats, grid: Grid | None) -> StoredWeights:
    """Stores a weight (N, K): rounded to nearest, or in float32 without a grid."""
    if grid is None:
        return StoredWeights(write_blob(folder, {name: weight}))
    return store_matrix(folder, name, quantize_rtn(weight, **asdict(grid)))


def store_matrix(folder: Path, name: str, matrix: BlockQuantized) -> StoredWeights:
    """Stores a quantized weight as codes, scales and zero points under its name. load_matrix is the inverse."""
    tensors: dict[str, NDArray[Any]] = {f"{name}.codes": matrix.codes, f"{name}.scales": matrix.scales}
    if matrix.zero_points is not None:
        tensors[f"{name}.zero_points"] = matrix.zero_points
    return StoredWeights(write_blob(folder, tensors), {name: matrix.grid})


def load_matrix(folder: Path, name: str, weights: StoredWeights, columns: int) -> BlockQuantized | Floats:
    """Loads a product's stored weight: quantized, or float32 (N, columns) if it has no grid."""
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
