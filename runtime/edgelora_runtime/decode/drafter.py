"""Guesses how a text goes on: as it did after the same tokens before, in itself or in what an adapter was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from edgelora_runtime.bundle.draft_table import LONGEST_CONTEXT, find_longest

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from edgelora_runtime.bundle.draft_table import DraftTable

_TEXT_CHANCES = (0.15, 0.4, 0.6)  # of a guess after 1, 2 and LONGEST_CONTEXT tokens of the text, until it is known better
_SHARES = 8  # classes of a table's guesses, by their share in the training data; as many where the text before agrees
_AGREEMENT = 0.4  # of a table's wrong guesses, that the text before is taken to tell from the right ones
_NEWEST = 1 / 32  # weight of the newest guess in its class's running share
_NEWEST_COST = 1 / 256  # of the newest token: answers differ, and a few dear ones in a row should not end speculation
_FIRST_COST = 0.9  # of a token, in steps of one row, until it is known better
_TRIAL = 16  # requests


class Guess(NamedTuple):
    """A token that may come next. kind: the class of such guesses. chance: how many of these were right of late."""

    token: int
    kind: int
    chance: float


class Experience:
    """How guesses did of late for one variant or mix: shares that were right, by class, and what a token came to cost.

    Classes are how many tokens of the text matched, then shares in a table, then those where the text agrees. Threads share it
    without a lock.
    """

    def __init__(self) -> None:
        shares = [(level + 0.5) / _SHARES for level in range(_SHARES)]
        self._rates = [*_TEXT_CHANCES, *shares, *(share + (1 - share) * _AGREEMENT for share in shares)]
        self._cost = _FIRST_COST
        self._requests = 0

    def guess_from_text(self, token: int, matching: int) -> Guess:
        return self._rate(token, matching - 1)

    def guess_from_table(self, token: int, share: float, *, agrees: bool) -> Guess:
        return self._rate(token, len(_TEXT_CHANCES) + agrees * _SHARES + min(int(share * _SHARES), _SHARES - 1))

    def learn(self, guess: Guess, token: int) -> None:
        """Takes into account which token it was that came."""
        self._rates[guess.kind] += ((guess.token == token) - self._rates[guess.kind]) * _NEWEST

    def note_cost(self, cost: float) -> None:
        """Takes into account what the latest token cost, in steps of one row."""
        self._cost += (cost - self._cost) * _NEWEST_COST

    def recommend(self) -> bool:
        """Whether the next request should speculate: if that paid of late; now and then the other, to see if it still does."""
        self._requests += 1
        return (self._cost < 1) != (self._requests % _TRIAL == 0)

    def _rate(self, token: int, kind: int) -> Guess:
        return Guess(token, kind, self._rates[kind])


class Drafter:
    """Guesses for one text as it grows. end_tokens: never guessed, since nothing is read behind them."""

    def __init__(
        self, text: Sequence[int], tables: Sequence[DraftTable], experience: Experience, end_tokens: Collection[int] = ()
    ) -> None:
        self._text = list(text)
        self._tables = tables
        self._experience = experience
        self._end_tokens = end_tokens
        self._next: dict[tuple[int, ...], int] = {}  # by 1, 2 or 3 tokens: the one that followed them last
        for length in range(1, LONGEST_CONTEXT + 1):
            contexts = zip(*(text[start:] for start in range(length)), strict=False)
            self._next.update(zip(contexts, text[length:], strict=False))

    def append(self, token: int) -> None:
        tail = tuple(self._text[-LONGEST_CONTEXT:])
        for start in range(len(tail)):
            self._next[tail[start:]] = token
        self._text.append(token)

    def guess(self, most: int, least_chance: float = 0.0) -> list[Guess]:
        """The likeliest continuation, at most so many tokens; each guess is made as if those before it were right.

        least_chance: that all guesses up to one are right; no further ones are looked up, but always the first.
        """
        guesses: list[Guess] = []
        tail = tuple(self._text[-LONGEST_CONTEXT:])
        reached = 1.0
        while len(guesses) < most:
            found = self._guess_next(tail)
            if found is None or found.token in self._end_tokens:
                break
            reached *= found.chance
            if guesses and reached < least_chance:
                break
            guesses.append(found)
            tail = (*tail[-LONGEST_CONTEXT + 1 :], found.token)
        return guesses

    def _guess_next(self, tail: tuple[int, ...]) -> Guess | None:
        context, token = find_longest(self._next, tail)
        best = None if token is None else self._experience.guess_from_text(token, len(context))
        for table in self._tables:
            entry = table.find(tail)
            if entry is not None:
                found = self._experience.guess_from_table(*entry, agrees=entry[0] == token)
                if best is None or found.chance > best.chance:
                    best = found
        return best
