"""What a step costs on this machine by how many tokens it reads ahead: averages of the steps that were taken."""

from __future__ import annotations

MOST_GUESSES = 8  # in one step
_SLOWER, _FASTER = 1 / 16, 1 / 2  # how far an average follows a step: other work on the machine makes steps slower alone
_UNTRIED = 1 / 8  # of a step without guesses: what one more costs until it was tried, too little so that it is tried
_PROBE = 32  # steps from one that tries another number of guesses to the next, so that averages do not grow old


class StepCosts:
    """Seconds of one model's steps. Threads share it without a lock: an average that is off by a step does no harm."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], float] = {}  # by rows that were read, and of these the ones that got logits
        self._steps = 0

    def note(self, rows: int, kept: int, seconds: float) -> None:
        """Takes a step into account; what takes more than twice the average counts as twice."""
        before = self._seconds.setdefault((rows, kept), seconds)
        change = min(seconds - before, before)
        self._seconds[rows, kept] = before + change * (_SLOWER if change > 0 else _FASTER)

    def estimate(self, most: int, least_rows: int = 1) -> list[float]:
        """Seconds of steps with 0 to `most` guesses, each of at least so many rows; [] until one without guesses was taken."""
        first = self._seconds.get((least_rows, 1))
        if first is None:
            return []
        found = [first]
        for guesses in range(1, most + 1):
            untried = found[-1] + _UNTRIED * first
            found.append(self._seconds.get((max(guesses + 1, least_rows), guesses + 1), untried))
        return found

    def probe(self, chosen: int, most: int) -> int:
        """The number of guesses that was chosen, or now and then one more or fewer, from 0 to `most`."""
        self._steps += 1
        if self._steps % _PROBE:
            return chosen
        return min(most, max(0, chosen + (1 if self._steps // _PROBE % 2 else -1)))


def find_least_chance(seconds: list[float]) -> float:
    """The chance to be right below which a guess cannot pay: what one more costs on the average, in steps without any."""
    return (seconds[-1] / seconds[0] - 1) / (len(seconds) - 1) if len(seconds) > 1 else 0.0


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
