"""Bootstrap intervals of scores that are quotients of sums over rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

_RESAMPLES = 2000
_LEVEL = 0.95
_CHUNK = 1 << 22  # counts drawn at a time


def bootstrap_interval(parts: Sequence[tuple[float, float]], seed: int = 0) -> tuple[float, float]:
    """Returns the 95% percentile interval of a quotient, from rows drawn with replacement.

    parts: a numerator and a denominator per row, of which the score is the quotient of the sums. Resamples whose denominators add
    up to 0 don't count. Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    values = np.asarray(parts, dtype=np.float64)
    count = len(values)
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // count)
    quotients = []
    for first in range(0, _RESAMPLES, step):
        drawn = generator.integers(count, size=(min(step, _RESAMPLES - first), count))
        sums = values[drawn].sum(axis=1)
        sums = sums[sums[:, 1] > 0]
        quotients.append(sums[:, 0] / sums[:, 1])
    low, high = np.quantile(np.concatenate(quotients), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
