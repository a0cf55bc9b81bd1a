"""Interference of low-rank deltas: sign conflicts, shared subspaces, cosines.

The functions are pure, and take the deltas' factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelora.mix.methods.spectra import count_directions, decompose_product

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgelora.mix.methods.deltas import Factors

    Doubles = NDArray[np.float64]

NEGLIGIBLE = 0.1  # share of a delta's root mean square; smaller entries have their sign by chance
_BLOCK = 1 << 20  # entries of a delta that are formed at once


@dataclass(frozen=True)
class Stack:
    """The factors of T deltas of one module, stacked.

    a: float64 (R, K). b: float64 (N, R), scales included. owner: float64 (T, R), 1 where a row of a belongs to a delta.
    """

    a: Doubles
    b: Doubles
    owner: Doubles

    @classmethod
    def of(cls, factors: Sequence[Factors | None]) -> Stack:
        """Stacks A (r, K) and B (N, r) of each delta.

        None stands for a delta that does not change the module. At least one must change it.
        """
        given = [(place, pair) for place, pair in enumerate(factors) if pair is not None]
        places = np.concatenate([np.full(len(a), place) for place, (a, _) in given])
        return cls(
            np.concatenate([a for _, (a, _) in given]).astype(np.float64),
            np.concatenate([b for _, (_, b) in given], axis=1).astype(np.float64),
            (places == np.arange(len(factors))[:, None]).astype(np.float64),
        )

    def rows(self, place: int) -> NDArray[np.intp]:
        """The rows of a that belong to a delta."""
        return np.flatnonzero(self.owner[place])

    def sum_blocks(self, matrix: Doubles) -> Doubles:
        """Sums a matrix (R, R) over the block of every two deltas: float64 (T, T)."""
        return np.asarray(self.owner @ matrix @ self.owner.T)


@dataclass(frozen=True)
class ModuleFigures:
    """Figures for each two of T deltas of one module, all float64 (T, T).

    inner: ⟨Δi, Δj⟩. loud: number of entries that are negligible in neither. opposed: how many of them have opposite signs.
    mass: Σ min(|Δi|, |Δj|) over all entries. opposed_mass: the same over entries with opposite signs, half of what cancels in
    Δi + Δj. row_overlap, column_overlap: see overlap().
    """

    inner: Doubles
    loud: Doubles
    opposed: Doubles
    mass: Doubles
    opposed_mass: Doubles
    row_overlap: Doubles
    column_overlap: Doubles


@dataclass(frozen=True)
class Interference:
    """Two deltas compared over one or more modules.

    A figure is 0 where there is nothing to compare.
    cosine: ⟨Δi, Δj⟩ / (‖Δi‖ ‖Δj‖). sign_conflict: share with opposite signs of the entries that are negligible in neither.
    weighted_conflict: the same share of Σ min(|Δi|, |Δj|). row_overlap, column_overlap: overlap() of what they read and of what
    they write, the mean over modules that both change. norms: ‖Δi‖ and ‖Δj‖. modules: how many both change.
    """

    cosine: float
    sign_conflict: float
    weighted_conflict: float
    row_overlap: float
    column_overlap: float
    norms: tuple[float, float]
    modules: int


def compare_deltas(stack: Stack) -> ModuleFigures:
    """Computes all figures of the deltas of one module.

    Forms their entries a few rows at a time.
    """
    count = len(stack.owner)
    inner = inner_products(stack)
    loud, opposed, mass, opposed_mass = _compare_signs(stack, np.sqrt(np.diag(inner)))
    spaces = [find_spaces(stack.a[own], stack.b[:, own]) for own in map(stack.rows, range(count))]
    rows, columns = np.zeros((2, count, count))
    for i, j in np.ndindex(count, count):
        rows[i, j], columns[i, j] = (overlap(one, other) for one, other in zip(spaces[i], spaces[j], strict=True))
    return ModuleFigures(inner, loud, opposed, mass, opposed_mass, rows, columns)


def summarize(figures: Sequence[ModuleFigures], i: int, j: int) -> Interference:
    """Compares deltas i and j over some modules."""

    def total(name: str, one: int = i, other: int = j) -> float:
        return float(sum(getattr(module, name)[one, other] for module in figures))

    both = [module for module in figures if module.inner[i, i] > 0 and module.inner[j, j] > 0]
    norms = (float(np.sqrt(total("inner", i, i))), float(np.sqrt(total("inner", j, j))))
    return Interference(
        cosine=_share(total("inner"), norms[0] * norms[1]),
        sign_conflict=_share(total("opposed"), total("loud")),
        weighted_conflict=_share(total("opposed_mass"), total("mass")),
        row_overlap=_share(sum(float(module.row_overlap[i, j]) for module in both), len(both)),
        column_overlap=_share(sum(float(module.column_overlap[i, j]) for module in both), len(both)),
        norms=norms,
        modules=len(both),
    )


def inner_products(stack: Stack) -> Doubles:
    """Computes ⟨Δi, Δj⟩ of every two deltas, float64 (T, T).

    It is the sum of BᵢᵀBⱼ ∘ AᵢAⱼᵀ, so no delta is formed.
    """
    return stack.sum_blocks((stack.b.T @ stack.b) * (stack.a @ stack.a.T))


def find_spaces(a: Doubles, b: Doubles) -> tuple[Doubles, Doubles]:
    """Finds orthonormal bases of what Δ = B·A reads, and of what it writes.

    They are float64 (K, r) and (N, r), where r is the rank of Δ.
    """
    u, s, vt = decompose_product(a, b)
    rank = count_directions(s, float(s[0])) if len(s) else 0
    return vt[:rank].T, u[:, :rank]


def overlap(one: Doubles, other: Doubles) -> float:
    """Computes the mean squared cosine of two orthonormal bases' principal angles.

    This is ‖VᵢᵀVⱼ‖² / min(r): 0 for orthogonal spaces, 1 if one contains the other, and r / K for two random spaces of rank r in
    K dimensions.
    """
    return _share(float(np.square(one.T @ other).sum()), min(one.shape[1], other.shape[1]))


def _compare_signs(stack: Stack, norms: Doubles) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    """loud, opposed, mass and opposed_mass of ModuleFigures, block by block. norms: of the deltas, (T,)."""
    count, columns = len(stack.owner), stack.a.shape[1]
    owned = [stack.rows(place) for place in range(count)]
    floors = NEGLIGIBLE * norms / np.sqrt(len(stack.b) * columns)
    # Signs do not need double precision, and single takes half the time.
    a, b = [stack.a[rows].astype(np.float32) for rows in owned], [stack.b[:, rows].astype(np.float32) for rows in owned]
    loud, opposed, mass, opposed_mass = np.zeros((4, count, count))
    step = max(1, _BLOCK // columns)
    for start in range(0, len(stack.b), step):
        entries = [left[start : start + step] @ right for left, right in zip(b, a, strict=True)]
        sizes, negative = [np.abs(block) for block in entries], [block < 0 for block in entries]
        heard = [size > floor for size, floor in zip(sizes, floors, strict=True)]
        for i in range(count):
            for j in range(i, count):
                both, opposite, smaller = heard[i] & heard[j], negative[i] ^ negative[j], np.minimum(sizes[i], sizes[j])
                loud[i, j] += both.sum()
                opposed[i, j] += (both & opposite).sum()
                mass[i, j] += smaller.sum(dtype=np.float64)
                opposed_mass[i, j] += smaller.sum(dtype=np.float64, where=opposite)
    return _mirror(loud), _mirror(opposed), _mirror(mass), _mirror(opposed_mass)


def _mirror(upper: Doubles) -> Doubles:
    return np.asarray(upper + np.triu(upper, 1).T)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
