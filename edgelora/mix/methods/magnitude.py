"""Trims deltas by magnitude, and sums trimmed deltas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelora.mix.methods.arithmetic import linear
from edgelora.mix.methods.deltas import TransformedDelta, map_row_blocks
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora.mix.methods.deltas import Floats, Rows

_EDGE = 1 - 2**-20  # magnitudes this close to the threshold equal it up to rounding
_SMALL = 1 << 16  # matrices of at most this many entries are sorted whole; also the size of the sample
_ROWS = 128  # evenly spaced rows that the sample is drawn from
_MARGIN = 0.02  # half-width of the first bracket around the sample's estimate, as a share of the entries


def magnitude(deltas: Sequence[Rows], weights: Sequence[float], *, density: float) -> Floats:
    """Sums deltas that each keep only their largest entries.

    This is PEFT's magnitude_prune on ΔW.
    """
    return linear(trim_all(deltas, density), weights)


@dataclass(frozen=True)
class Trimmed(TransformedDelta):
    """A delta with all entries below a magnitude set to zero."""

    threshold: float

    def __getitem__(self, rows: slice) -> Floats:
        part = self.delta[rows]
        trimmed: Floats = part * (np.abs(part) >= part.dtype.type(self.threshold))  # five times as fast as np.where
        return trimmed


def trim(delta: Rows, density: float) -> Trimmed:
    """Zeroes all but the largest `density` share of a delta's entries.

    Entries equal to the threshold are all kept.
    """
    return Trimmed(delta, _EDGE * find_threshold(delta, density))


def trim_all(deltas: Sequence[Rows], density: float) -> list[Trimmed]:
    return [trim(delta, density) for delta in deltas]


def check_density(density: float) -> None:
    """Raises InputError unless a density is a share of entries to keep."""
    if not 0 < density <= 1:
        raise InputError(f"density = {density}: use a share, more than 0 and at most 1")


def find_threshold(delta: Rows, density: float) -> float:
    """The magnitude of the ceil(density · N · K)-th largest entry.

    A sample of the rows brackets the threshold. A pass over all entries counts those above the bracket and collects those
    inside. If the bracket was wrong, a wider one is tried. So the result is exact, and the matrix is never copied.
    """
    check_density(density)
    size = delta.shape[0] * delta.shape[1]
    kept = math.ceil(density * size)
    if size <= _SMALL:
        return _pick(np.abs(delta[:]).ravel(), kept)
    spread = np.abs(delta[:: max(1, delta.shape[0] // _ROWS)])
    sample = np.sort(spread.ravel()[:: max(1, spread.size // _SMALL)])
    margin = _MARGIN
    while True:
        middle = 1 - kept / size
        low, high = (int(len(sample) * (middle + side * margin)) for side in (-1, 1))
        least = sample[low] if low > 0 else sample.dtype.type(0)
        most = sample[high] if high < len(sample) else sample.dtype.type(np.inf)

        def look(rows: slice, least: Floats = least, most: Floats = most) -> tuple[int, Floats]:
            magnitudes = np.abs(delta[rows]).ravel()
            outside = magnitudes > most
            return int(np.count_nonzero(outside)), magnitudes[np.flatnonzero((magnitudes >= least) > outside)]

        found = map_row_blocks(look, delta.shape)
        above, candidates = sum(count for count, _ in found), np.concatenate([inside for _, inside in found])
        if 0 < kept - above <= len(candidates):
            return _pick(candidates, kept - above)
        margin *= 4


def _pick(magnitudes: Floats, count: int) -> float:
    """The count-th largest magnitude."""
    place = len(magnitudes) - count
    return float(np.partition(magnitudes, place)[place])
