"""Weights in int8 or float8 with scales per tensor, row, group of columns or block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.base.quantized.weights.checks import check_shape, read_shape
from edgelora_export.base.quantized.weights.codes import decode_exponents, list_groups, scale_groups
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgelora_export.base.tensors import Tensors


@dataclass(frozen=True)
class ScaledWeight:
    """A weight whose stored numbers are multiplied by scales. Satisfies Weight.

    scale, zero_point: names of tensors that hold one value for each block. block: rows and columns of a block. Those at the end
    may be smaller.
    """

    stored: Tensors
    weight: str
    scale: str
    zero_point: str | None
    shape: tuple[int, ...]
    block: tuple[int, int]

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.weight, self.scale) if self.zero_point is None else (self.weight, self.scale, self.zero_point)

    def read_rows(self, start: int, stop: int) -> NDArray[np.float32]:
        rows = np.arange(start, stop) // self.block[0]
        scales = decode_exponents(read_grid(self.stored, self.scale))[rows]
        zeros = None if self.zero_point is None else read_grid(self.stored, self.zero_point)[rows]
        groups = list_groups(self.shape[1], self.block[1])
        return scale_groups(self.stored.read_rows(self.weight, start, stop), scales, zeros, groups)


def open_scaled(
    stored: Tensors, weight: str, scale: str, zero_point: str | None = None, *, block: tuple[int, int] | None = None
) -> ScaledWeight:
    """Finds the blocks of a weight. block: its rows and columns by config.json, or None to take them from the scales.

    Raises InputError for tensors that are missing or do not fit.
    """
    shape = read_shape(stored, weight, scale, dimensions=2)
    block = find_block(stored, scale, shape, block)
    if zero_point is not None:
        check_shape(stored, zero_point, stored.shape(scale), reason=scale)
    return ScaledWeight(stored, weight, scale, zero_point, shape, block)


def find_block(stored: Tensors, scale: str, shape: tuple[int, ...], said: tuple[int, int] | None = None) -> tuple[int, int]:
    """Finds how many rows and columns of a weight share a scale.

    shape: the weight's, (N, K). said: a block by config.json, or None to take it from the scales. A single scale is the tensor's.
    Raises InputError if the scales do not fit.
    """
    found = read_shape(stored, scale, f"a weight of {list(shape)}")
    grid = _as_grid(found)
    if (
        len(found) <= 2
        and (said is None or grid == (1, 1))
        and all(n and not size % n for size, n in zip(shape, grid, strict=True))
    ):
        return shape[0] // grid[0], shape[1] // grid[1]
    if said is None:
        raise InputError(f"tensor {scale} has the shape {list(found)}, which does not divide a weight of {list(shape)}")
    wanted = (-(-shape[0] // said[0]), -(-shape[1] // said[1]))
    check_shape(stored, scale, wanted, reason=f"a weight of {list(shape)} in blocks of {list(said)}")
    return said


def read_grid(stored: Tensors, name: str) -> NDArray[Any]:
    """Reads scales or zero points as a matrix with one value for each block."""
    values = stored.read(name)
    return values.reshape(_as_grid(values.shape))


def _as_grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """Counts rows and columns of scales: one for the tensor, one for each row, or a matrix of them."""
    rows, columns = (*shape, 1, 1)[:2]
    return rows, columns
