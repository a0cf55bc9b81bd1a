"""Deltas as methods read them: by runs of rows, whether an array or a product B·A that is never formed whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Floats: TypeAlias = NDArray[np.floating[Any]]
Factors: TypeAlias = tuple[Floats, Floats]  # A (r, K) and B (N, r)

RUN = 1 << 16  # entries that are worked on at once: the arrays that a method needs for them stay in a core's cache


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
        product: Floats = self.b[rows] @ self.a
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


def by_runs(merge: Callable[[Sequence[Floats]], Floats], deltas: Sequence[Rows]) -> Floats:
    """What a function makes of equal runs of several matrices, put together to one (N, K)."""
    merged: Floats = np.empty(deltas[0].shape, deltas[0].dtype)
    for rows in runs(merged.shape):
        merged[rows] = merge([delta[rows] for delta in deltas])
    return merged
