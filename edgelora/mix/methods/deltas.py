"""Deltas as the methods read them: in blocks of rows.

They come from an array, or from a product B·A that is never formed whole.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Found = TypeVar("Found")
Floats: TypeAlias = NDArray[np.floating[Any]]
Factors: TypeAlias = tuple[Floats, Floats]  # A (r, K) and B (N, r)

BLOCK_ENTRIES = 1 << 16  # entries processed at once, so that a method's temporary arrays stay in a core's cache
_SINGLE_THREAD = 1 << 18  # multiplications up to which OpenBLAS computes a product in the calling thread


class Rows(Protocol):
    """A matrix (N, K), float32 or float64, that can be sliced by rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, rows: slice, /) -> Floats: ...


@dataclass(frozen=True)
class Product:
    """B·A as a matrix that is computed by slices of rows.

    a: (r, K). b: (N, r).
    """

    a: Floats
    b: Floats

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.b.dtype

    def __getitem__(self, rows: slice) -> Floats:
        b = self.b[rows]
        product: Floats = np.empty((len(b), self.shape[1]), np.result_type(self.a, b))
        # In parts small enough for one thread: beside a busy program, waiting for more threads took ten times the product's time.
        step = max(1, _SINGLE_THREAD // max(1, b.size))
        for start in range(0, self.shape[1], step):
            np.matmul(b, self.a[:, start : start + step], out=product[:, start : start + step])
        return product


@dataclass(frozen=True)
class TransformedDelta:
    """A delta whose entries are transformed on reading.

    Shape and type stay the same. Subclasses define __getitem__.
    """

    delta: Rows

    @property
    def shape(self) -> tuple[int, ...]:
        return self.delta.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.delta.dtype


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices that cover the rows of a matrix (N, K) in blocks."""
    step = max(1, BLOCK_ENTRIES // shape[1])
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def map_row_blocks(find: Callable[[slice], Found], shape: tuple[int, ...]) -> list[Found]:
    """Applies a function to each block of rows of a matrix (N, K).

    It uses all cores, and returns the results in order.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy releases the GIL
        return list(pool.map(find, row_blocks(shape)))


def merge_row_blocks(merge: Callable[[Sequence[Floats]], Floats], deltas: Sequence[Rows]) -> Floats:
    """Applies a function to the same block of rows of several matrices.

    Assembles the results into one matrix (N, K).
    """
    merged: Floats = np.empty(deltas[0].shape, deltas[0].dtype)

    def fill(rows: slice) -> None:
        merged[rows] = merge([delta[rows] for delta in deltas])

    map_row_blocks(fill, merged.shape)
    return merged
