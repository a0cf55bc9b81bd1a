"""Measured costs of steps on this machine, by the number of tokens that they read.

They determine how many draft tokens are worthwhile.
"""

from __future__ import annotations

from itertools import accumulate
from operator import mul

MAX_DRAFT_TOKENS = 8  # in one step
MIN_ROWS = 2  # of a step whose logits must equal those of steps with draft tokens, bit by bit: see SpeculatingReader
_NEWEST, _NEWEST_PLAIN = 1 / 64, 1 / 16  # weight of the newest step in a running average; there may be few plain ones
_FIRST_SLOPE = 1 / 8  # assumed cost of one more row, in steps, until it has been measured: low, so that it does get tried
_PRIOR = 4.0  # weight of that assumption, in steps whose rows differ from the mean by one
_PROBE = 32  # steps between two that try another number of draft tokens, so that there is always a slope to measure


class StepCosts:
    """Seconds of one model's steps.

    They are an average for steps of one row, and a line for steps of more, as each row adds the same.
    """

    def __init__(self) -> None:
        self.plain: float | None = None  # a step of one row; None until there was one
        self._weight = self._rows = self._seconds = 0.0  # decaying sums over steps of several rows: of 1, of r and of s
        self._rows_squared = self._products = 0.0  # of r * r and r * s
        self._steps = 0

    def note(self, rows: int, seconds: float) -> None:
        """Adds a step to the measurements.

        A step that other work slowed to more than twice its estimate counts as twice.
        """
        if rows < MIN_ROWS:
            self.plain = (
                seconds if self.plain is None else self.plain + (min(seconds, 2 * self.plain) - self.plain) * _NEWEST_PLAIN
            )
            return
        if self._weight:
            fixed, slope = self._fit()
            seconds = min(seconds, 2 * (fixed + slope * rows))
        keep = 1 - _NEWEST
        self._weight = keep * self._weight + 1
        self._rows = keep * self._rows + rows
        self._seconds = keep * self._seconds + seconds
        self._rows_squared = keep * self._rows_squared + rows * rows
        self._products = keep * self._products + rows * seconds

    def estimate(self, limit: int, min_rows: int) -> list[float]:
        """Returns the seconds of steps with 0 to `limit` draft tokens.

        Each step has min_rows rows or more. Returns [] before the first measurement.
        """
        if not self._weight and self.plain is None:
            return []
        fixed, slope = self._fit()
        seconds = [fixed + slope * max(rows, min_rows) for rows in range(1, limit + 2)]
        if self.plain is not None and min_rows < MIN_ROWS:
            seconds[0] = self.plain
        return seconds

    def probe(self, chosen: int, limit: int) -> int:
        """Returns the chosen number of draft tokens.

        Now and then it is one more, up to `limit`, or none.
        """
        self._steps += 1
        if self._steps % _PROBE:
            return chosen
        return min(limit, chosen + 1) if self._steps // _PROBE % 2 else 0

    def _fit(self) -> tuple[float, float]:
        """Returns the seconds of a step without rows and of each row, by least squares.

        The latter is close to _FIRST_SLOPE while the rows hardly vary.
        """
        if not self._weight:
            plain = self.plain or 0.0
            return plain * (1 - _FIRST_SLOPE), plain * _FIRST_SLOPE
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows_squared - self._rows * mean_rows
        slope = (self._products - self._rows * mean_seconds + _PRIOR * _FIRST_SLOPE * mean_seconds) / (spread + _PRIOR)
        slope = min(max(slope, 0.0), mean_seconds / mean_rows)  # a step without rows would cost 0 or more
        return mean_seconds - slope * mean_rows, slope


def find_break_even(seconds: list[float]) -> float:
    """Returns the acceptance rate below which a draft token cannot pay.

    It is the average cost of one more, in steps without any.
    """
    return (seconds[-1] / seconds[0] - 1) / (len(seconds) - 1) if len(seconds) > 1 else 0.0


def count_likely(rates: list[float], min_rate: float) -> int:
    """Counts the draft tokens that are accepted with a probability of at least min_rate.

    The probability is that of accepting a token and all before it.
    """
    return sum(reached >= min_rate for reached in accumulate(rates, mul))


def choose_length(rates: list[float], seconds: list[float]) -> int:
    """Returns the number of draft tokens that gives the most tokens per second.

    rates: acceptance rate of each draft token if all before it are accepted. seconds: of steps with 0, 1, … draft tokens. No
    longer drafts are considered.
    """
    best, tokens, reached = 0, 1.0, 1.0
    fastest = 1.0 / seconds[0] if seconds else 0.0
    for length, (rate, cost) in enumerate(zip(rates, seconds[1:], strict=False), 1):
        reached *= rate
        tokens += reached  # a step gives the draft tokens that are accepted, and one token more
        if tokens > fastest * cost:
            best, fastest = length, tokens / cost
    return best
