"""What a mix keeps of its adapters: the one number that a search raises, and how sure a difference in it is."""

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
    """Per task the figure (a loss or a score) of the base, and what one adapter alone changes in it, with its sign.

    A mix keeps (base - mix) / change of a task, whichever way the figure goes: 1 is what the adapter does alone, 0 what the
    base does. Tasks of any scale so count alike.
    """

    base: Mapping[str, float]
    change: Mapping[str, float]

    @classmethod
    def read(cls, base: Mapping[str, float], alone: Mapping[str, Mapping[str, float]], *, higher_is_better: bool) -> Objective:
        """From the figures of the base and of each adapter alone.

        A task is the adapter's of its name, or else of the one that serves it best. Raises InputError where that one is no
        better than the base.
        """
        sign = 1 if higher_is_better else -1
        chosen = {task: task if task in alone else max(alone, key=lambda name: sign * alone[name][task]) for task in base}
        found = {task: alone[name][task] for task, name in chosen.items()}
        if wrong := [
            f"{task}: the adapter {chosen[task]} comes to {found[task]:.4g}, the base alone to {base[task]:.4g}"
            for task in base
            if sign * (found[task] - base[task]) <= 0
        ]:
            raise InputError(f"{'; '.join(wrong)}: there is nothing that a mix could keep; check --data and --adapter")
        return cls(dict(base), {task: base[task] - figure for task, figure in found.items()})

    def kept(self, figures: Mapping[str, float]) -> float:
        """What a mix keeps, averaged over tasks."""
        return float(np.mean([self._share(task, figures[task]) for task in self.base]))

    def difference(self, one: Mapping[str, Doubles], other: Mapping[str, Doubles], seed: int) -> tuple[float, float, float]:
        """What one mix keeps more than another, with its 95% bootstrap interval over rows.

        one, other: of the same rows, per task, the parts of their figures, float64 (rows, 2); see Scorer.score.
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
    """The figure of each task from its rows' parts."""
    totals = {task: rows.sum(axis=0) for task, rows in parts.items()}
    return {task: float(above / below) for task, (above, below) in totals.items()}
