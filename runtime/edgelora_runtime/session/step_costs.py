"""What steps cost on this machine by how many tokens they read, and how many guesses that makes worth while."""

from __future__ import annotations

from itertools import accumulate
from operator import mul

MOST_GUESSES = 8  # in one step
LEAST_ROWS = 2  # of a step whose logits are to be those of steps with guesses, bit by bit: see SpeculatingReader
_NEWEST, _NEWEST_PLAIN = 1 / 64, 1 / 16  # weight of the newest step in a running average; plain ones may be few
_FIRST_SLOPE = 1 / 8  # of a step: what one more row is taken to cost until it was tried, too little so that it is tried
_PRIOR = 4.0  # how much that counts, in steps that are a row away from the mean
_PROBE = 32  # steps from one that tries another number of guesses to the next, so that there is always a slope to see


class StepCosts:
    """Seconds of one model's steps: an average for those of one row, a line through those of more, since each row adds alike."""

    def __init__(self) -> None:
        self.plain: float | None = None  # a step of one row, once one was taken
        self._weight = self._rows = self._seconds = 0.0  # decaying sums over steps of several rows, here of 1, r and s
        self._rows_squared = self._products = 0.0  # of r * r and r * s
        self._steps = 0

    def note(self, rows: int, seconds: float) -> None:
        """Takes a step into account; one that takes more than twice what was expected, as by other work, counts as twice."""
        if rows < LEAST_ROWS:
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

    def estimate(self, most: int, least_rows: int) -> list[float]:
        """Seconds of steps with 0 to `most` guesses, none of fewer rows; [] until a step was taken that tells."""
        if not self._weight and self.plain is None:
            return []
        fixed, slope = self._fit()
        seconds = [fixed + slope * max(rows, least_rows) for rows in range(1, most + 2)]
        if self.plain is not None and least_rows < LEAST_ROWS:
            seconds[0] = self.plain
        return seconds

    def probe(self, chosen: int, most: int) -> int:
        """The number of guesses that was chosen, or now and then one more, if that is at `most`, or none."""
        self._steps += 1
        if self._steps % _PROBE:
            return chosen
        return min(most, chosen + 1) if self._steps // _PROBE % 2 else 0

    def _fit(self) -> tuple[float, float]:
        """Seconds of a step without rows and of each row, least squares; drawn towards _FIRST_SLOPE while rows hardly varied."""
        if not self._weight:
            plain = self.plain or 0.0
            return plain * (1 - _FIRST_SLOPE), plain * _FIRST_SLOPE
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows_squared - self._rows * mean_rows
        slope = (self._products - self._rows * mean_seconds + _PRIOR * _FIRST_SLOPE * mean_seconds) / (spread + _PRIOR)
        slope = min(max(slope, 0.0), mean_seconds / mean_rows)  # a step without rows would cost 0 or more
        return mean_seconds - slope * mean_rows, slope


def find_least_chance(seconds: list[float]) -> float:
    """The chance to be right below which a guess cannot pay: what one more costs on the average, in steps without any."""
    return (seconds[-1] / seconds[0] - 1) / (len(seconds) - 1) if len(seconds) > 1 else 0.0


def count_likely(chances: list[float], least_chance: float) -> int:
    """How many guesses are right, all up to that one, with at least that chance."""
    return sum(reached >= least_chance for reached in accumulate(chances, mul))


def choose_length(chances: list[float], seconds: list[float]) -> int:
    """How many guesses give the most tokens per second.

    chances: of each guess to be right if those before it are. seconds: of steps with 0, 1, … guesses; as many are considered.
    """
    best, tokens, reached = 0, 1.0, 1.0
    fastest = 1.0 / seconds[0] if seconds else 0.0
    for guesses, (chance, cost) in enumerate(zip(chances, seconds[1:], strict=False), 1):
        reached *= chance
        tokens += reached  # an answer goes on as far as guesses are right, and one token more
        if tokens > fastest * cost:
            best, fastest = guesses, tokens / cost
    return best
