"""DARE: drops entries of ΔW at random and rescales the rest (arXiv 2311.03099).

It then sums, or elects signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelora.mix.methods.arithmetic import linear
from edgelora.mix.methods.deltas import TransformedDelta
from edgelora.mix.methods.magnitude import check_density
from edgelora.mix.methods.ties import elect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora.mix.methods.deltas import Floats, Rows

_STEPS = 1 << 16  # a probability is a multiple of 1 / _STEPS


@dataclass(frozen=True)
class Dropped(TransformedDelta):
    """A delta whose entries are each kept with a probability, and divided by it.

    kept: the probability in 65536ths. A row's draws depend only on the seed and the row's index, so any slice gives the same
    entries.
    """

    kept: int
    seed: int

    @property
    def probability(self) -> float:
        return self.kept / _STEPS

    def __getitem__(self, rows: slice) -> Floats:
        part = self.delta[rows]
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1
        per_row = -(-self.shape[1] // 4)  # words of 64 bits, with four draws each
        generator = np.random.PCG64(self.seed).advance(start * per_row)
        draws = generator.random_raw((stop - start) * per_row).astype("<u8", copy=False).view("<u2")
        draws = draws.reshape(stop - start, 4 * per_row)[:, : self.shape[1]]
        scaled: Floats = part * part.dtype.type(1 / self.probability) * (draws < self.kept)
        return scaled


def drop(delta: Rows, density: float, seed: int) -> Dropped:
    """Keeps each entry with probability `density`, and divides it by that.

    The probability is rounded to the nearest 65536th.
    """
    check_density(density)
    return Dropped(delta, max(1, round(density * _STEPS)), seed)


def dare_linear(deltas: Sequence[Rows], weights: Sequence[float], *, density: float, seeds: Sequence[int]) -> Floats:
    """Merges with DARE and task arithmetic.

    seeds: one per delta. Deltas with the same seed drop the same entries.
    """
    return linear([drop(delta, density, seed) for delta, seed in zip(deltas, seeds, strict=True)], weights)


def dare_ties(deltas: Sequence[Rows], weights: Sequence[float], *, density: float, seeds: Sequence[int]) -> Floats:
    """Merges with DARE, then TIES without trimming.

    It elects signs and averages by count, as in PEFT and mergekit.
    """
    dropped = [drop(delta, density, seed) for delta, seed in zip(deltas, seeds, strict=True)]
    return elect(dropped, weights)
