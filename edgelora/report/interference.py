"""How much low-rank deltas stand in each other's way: sign conflicts, shared subspaces, cosines. Pure functions on factors."""

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

NEGLIGIBLE = 0.1  # of a delta's root mean square: entries below it have a sign by chance
_BLOCK = 1 << 20  # entries of a delta formed at once


@dataclass(frozen=True)
class Stack:
    """The factors of T deltas of one module, one above the other.

    a: float64 (R, K). b: float64 (N, R), scales folded in. owner: float64 (T, R), 1 where a row of a is a delta's.
    """

    a: Doubles
    b: Doubles
    owner: Doubles

    @classmethod
    def of(cls, factors: Sequence[Factors | None]) -> Stack:
        """From A (r, K) and B (N, r) of each delta, one at least; None for one that leaves the module alone."""
        given = [(place, pair) for place, pair in enumerate(factors) if pair is not None]
        places = np.concatenate([np.full(len(a), place) for place, (a, _) in given])
        return cls(
            np.concatenate([a for _, (a, _) in given]).astype(np.float64),
            np.concatenate([b for _, (_, b) in given], axis=1).astype(np.float64),
            (places == np.arange(len(factors))[:, None]).astype(np.float64),
        )

    def rows(self, place: int) -> NDArray[np.intp]:
        """Which rows of a are a delta's."""
        return np.flatnonzero(self.owner[place])

    def sum_blocks(self, matrix: Doubles) -> Doubles:
        """The sum of each block of a matrix (R, R) that belongs to two deltas: float64 (T, T)."""
        return np.asarray(self.owner @ matrix @ self.owner.T)


@dataclass(frozen=True)
class ModuleFigures:
    """Figures of every two of T deltas of one module, each float64 (T, T) unless said otherwise.

    inner: ⟨Δi, Δj⟩. loud, opposed: entries that are not negligible in both, and those of them with opposite signs.
    mass, opposed_mass: Σ min(|Δi|, |Δj|) over all entries, and over those with opposite signs: what a sum of both loses.
    row_overlap, column_overlap: see overlap().
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
    """Two deltas against each other, over one or more modules; 0 where there is nothing to compare.

    cosine: ⟨Δi, Δj⟩ / (‖Δi‖ ‖Δj‖). sign_conflict: of the entries that are not negligible in both, the share with opposite
    signs. weighted_conflict: the share of Σ min(|Δi|, |Δj|) that has them. row_overlap, column_overlap: mean over the modules
    that both change of ‖VᵢᵀVⱼ‖² / min(r) for what they read and what they write; 1 where one space holds the other.
    norms: ‖Δi‖ and ‖Δj‖. modules: how many both change.
    """

    cosine: float
    sign_conflict: float
    weighted_conflict: float
    row_overlap: float
    column_overlap: float
    norms: tuple[float, float]
    modules: int


def compare_deltas(stack: Stack) -> ModuleFigures:
    """All figures of the deltas of one module; forms their entries some rows at a time."""
    count = len(stack.owner)
    inner = inner_products(stack)
    loud, opposed, mass, opposed_mass = _compare_signs(stack, np.sqrt(np.diag(inner)))
    spaces = [find_spaces(stack.a[own], stack.b[:, own]) for own in map(stack.rows, range(count))]
    rows, columns = np.zeros((2, count, count))
    for i, j in np.ndindex(count, count):
        rows[i, j], columns[i, j] = (overlap(one, other) for one, other in zip(spaces[i], spaces[j], strict=True))
    return ModuleFigures(inner, loud, opposed, mass, opposed_mass, rows, columns)


def summarize(figures: Sequence[ModuleFigures], i: int, j: int) -> Interference:
    """Two of the deltas over some modules."""

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
    """⟨Δi, Δj⟩ of every two deltas, float64 (T, T): the sum of BᵢᵀBⱼ ∘ AᵢAⱼᵀ, so that no delta is formed."""
    return stack.sum_blocks((stack.b.T @ stack.b) * (stack.a @ stack.a.T))


def find_spaces(a: Doubles, b: Doubles) -> tuple[Doubles, Doubles]:
    """Orthonormal bases of what Δ = B·A reads, float64 (K, r), and of what it writes, float64 (N, r), r being Δ's rank."""
    u, s, vt = decompose_product(a, b)
    rank = count_directions(s, float(s[0])) if len(s) else 0
    return vt[:rank].T, u[:, :rank]


def overlap(one: Doubles, other: Doubles) -> float:
    """‖VᵢᵀVⱼ‖² / min(r) of two orthonormal bases, the mean squared cosine of their principal angles: 0 to 1.

    Two random spaces of rank r in K dimensions come to r / K.
    """
    return _share(float(np.square(one.T @ other).sum()), min(one.shape[1], other.shape[1]))


def _compare_signs(stack: Stack, norms: Doubles) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    """loud, opposed, mass and opposed_mass of ModuleFigures, from the deltas' norms, (T,), and their entries, block by block."""
    count, columns = len(stack.owner), stack.a.shape[1]
    owned = [stack.rows(place) for place in range(count)]
    floors = NEGLIGIBLE * norms / np.sqrt(len(stack.b) * columns)
    # A sign needs no double precision, and single takes half the time.
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
