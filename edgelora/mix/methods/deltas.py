"""Deltas as methods read them: by runs of rows, whether an array or a product B·A that is never formed whole."""

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

RUN = 1 << 16  # entries that are worked on at once: the arrays that a method needs for them stay in a core's cache
_ALONE = 1 << 18  # multiplications of a product that OpenBLAS computes in the thread that asks for it


class Rows(Protocol):
    """A matrix (N, K), float32 or float64, that gives slices of its rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, rows: slice, /) -> Floats: ...


@dataclass(frozen=True)
class Product:
    """B·A as a matrix that gives slices of its rows. a: (r, K). b: (N, r)."""

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
        # In parts that no other thread is woken for: beside a busy program, waiting for it took ten times as long as the product.
        step = max(1, _ALONE // max(1, b.size))
        for start in range(0, self.shape[1], step):
            np.matmul(b, self.a[:, start : start + step], out=product[:, start : start + step])
        return product


@dataclass(frozen=True)
class Changed:
    """A delta whose entries are changed as they are read: as large as it, and of its type. __getitem__ is its kinds'."""

    delta: Rows

    @property
    def shape(self) -> tuple[int, ...]:
        return self.delta.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.delta.dtype


def runs(shape: tuple[int, ...]) -> Iterator[slice]:
    """The rows of a matrix (N, K) in runs of a few."""
    step = max(1, RUN // shape[1])
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def each_run(find: Callable[[slice], Found], shape: tuple[int, ...]) -> list[Found]:
    """What a function finds in each run of rows of a matrix (N, K), in their order; as many at once as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy releases the GIL
        return list(pool.map(find, runs(shape)))


def by_runs(merge: Callable[[Sequence[Floats]], Floats], deltas: Sequence[Rows]) -> Floats:
    """What a function makes of equal runs of several matrices, put together to one (N, K)."""
    merged: Floats = np.empty(deltas[0].shape, deltas[0].dtype)

    def fill(rows: slice) -> None:
        merged[rows] = merge([delta[rows] for delta in deltas])

    each_run(fill, merged.shape)
    return merged
