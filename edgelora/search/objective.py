"""The objective of a search: the share of its adapters' effect that a mix keeps.

Differences between mixes have confidence intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

RESAMPLES = 2000


@dataclass(frozen=True)
class Objective:
    """The base's figure per task, and the signed change that a single adapter makes.

    A figure is a loss or a score, and its change is (base - adapter). A mix keeps (base - mix) / change of a task: 1 equals the
    single adapter, 0 equals the base. This holds for losses and scores, and makes tasks of different scales comparable.
    """

    base: Mapping[str, float]
    change: Mapping[str, float]

    @classmethod
    def read(cls, base: Mapping[str, float], alone: Mapping[str, Mapping[str, float]], *, higher_is_better: bool) -> Objective:
        """Makes an objective from the figures of the base and of each single adapter.

        A task belongs to the adapter of the same name, or else to the adapter that does best on it. Raises InputError if that
        adapter is no better than the base.
        """
        sign = 1 if higher_is_better else -1
        chosen = {task: task if task in alone else max(alone, key=lambda name: sign * alone[name][task]) for task in base}
        found = {task: alone[name][task] for task, name in chosen.items()}
        if wrong := [
            f"{task}: the adapter {chosen[task]} reaches {found[task]:.4g}, and the base alone {base[task]:.4g}"
            for task in base
            if sign * (found[task] - base[task]) <= 0
        ]:
            raise InputError(f"{'; '.join(wrong)}: there is nothing for a mix to keep; check --data and --adapter")
        return cls(dict(base), {task: base[task] - figure for task, figure in found.items()})

    def kept(self, figures: Mapping[str, float]) -> float:
        """The share that a mix keeps, averaged over tasks."""
        return float(np.mean([*self.shares(figures).values()]))

    def shares(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The share that a mix keeps of each task."""
        return {task: float(self._share(task, figures[task])) for task in self.base}

    def difference(self, one: Mapping[str, Doubles], other: Mapping[str, Doubles], seed: int) -> tuple[float, float, float]:
        """Measures how much more one mix keeps than another.

        Returns the difference and its 95% bootstrap interval over rows.
        one, other: per task, on the same rows, numerators and denominators, float64 (rows, 2), as from Scorer.score.
        """
        generator = np.random.default_rng(seed)
        drawn = np.zeros(RESAMPLES)
        for task in self.base:
            count = len(one[task])
            picks = generator.integers(0, count, (RESAMPLES, count))
            sums = [parts[task][picks].sum(axis=1) for parts in (one, other)]
            shares = [self._share(task, part[:, 0] / np.maximum(part[:, 1], 1)) for part in sums]
            drawn += (shares[0] - shares[1]) / len(self.base)
        low, high = np.quantile(drawn, [0.025, 0.975])
        return self.kept(sum_up(one)) - self.kept(sum_up(other)), float(low), float(high)

    def _share(self, task: str, figure: float | Doubles) -> float | Doubles:
        share: float | Doubles = (self.base[task] - figure) / self.change[task]
        return share


def sum_up(parts: Mapping[str, Doubles]) -> dict[str, float]:
    """Each task's figure, from the numerators and denominators of its rows."""
    totals = {task: rows.sum(axis=0) for task, rows in parts.items()}
    return {task: float(above / below) for task, (above, below) in totals.items()}
