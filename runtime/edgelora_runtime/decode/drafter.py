"""Draft tokens, taken from what followed the same tokens before.

That is earlier in the text itself, or in an adapter's training data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from edgelora_runtime.bundle.draft_table import MAX_CONTEXT, find_longest

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from edgelora_runtime.bundle.draft_table import DraftTable

_TEXT_RATES = (0.15, 0.4, 0.6)  # initial acceptance rates of a match of 1, 2 and MAX_CONTEXT tokens of the text
_SHARES = 8  # classes of a table's entries, by share in the training data; the same number again where the text agrees
_AGREEMENT = 0.4  # share of a table's wrong tokens that the text is assumed to tell from the right ones
_NEWEST = 1 / 32  # weight of the newest draft token in its class's running rate
_NEWEST_COST = 1 / 256  # weight of the newest token's cost: a few expensive tokens in a row should not end speculation
_FIRST_COST = 0.9  # assumed cost of a token, in steps of one row, until it has been measured
_TRIAL = 16  # requests


class DraftToken(NamedTuple):
    """A token that may come next.

    kind: its class in AcceptanceStatistics. rate: the recent acceptance rate of that class.
    """

    token: int
    kind: int
    rate: float


class AcceptanceStatistics:
    """Recent acceptance rates by class, and the cost of a token, for one variant or mix.

    The classes are the number of tokens of the text that matched, then shares in a table, then those shares where the text
    agrees. Threads share an instance without a lock.
    """

    def __init__(self) -> None:
        shares = [(level + 0.5) / _SHARES for level in range(_SHARES)]
        self._rates = [*_TEXT_RATES, *shares, *(share + (1 - share) * _AGREEMENT for share in shares)]
        self._cost = _FIRST_COST
        self._requests = 0

    def rate_text_match(self, token: int, matching: int) -> DraftToken:
        """Rates a draft token that followed the last `matching` tokens elsewhere in the text."""
        return self._rate(token, matching - 1)

    def rate_table_entry(self, token: int, share: float, *, agrees: bool) -> DraftToken:
        """Rates a draft token from a table, by its share in the training data.

        agrees: whether the text proposes it, too.
        """
        return self._rate(token, len(_TEXT_RATES) + agrees * _SHARES + min(int(share * _SHARES), _SHARES - 1))

    def record(self, draft: DraftToken, token: int) -> None:
        """Records the token that was drawn where a draft token was proposed."""
        self._rates[draft.kind] += ((draft.token == token) - self._rates[draft.kind]) * _NEWEST

    def record_cost(self, cost: float) -> None:
        """Records the cost of the newest token, in steps of one row."""
        self._cost += (cost - self._cost) * _NEWEST_COST

    def recommend(self) -> bool:
        """True if the next request should speculate, since it paid recently.

        Now and then it is the opposite, to measure again.
        """
        self._requests += 1
        return (self._cost < 1) != (self._requests % _TRIAL == 0)

    def _rate(self, token: int, kind: int) -> DraftToken:
        return DraftToken(token, kind, self._rates[kind])


class Drafter:
    """A source of draft tokens for one text as it grows.

    end_tokens: never proposed, since nothing is read after them.
    """

    def __init__(
        self,
        text: Sequence[int],
        tables: Sequence[DraftTable],
        statistics: AcceptanceStatistics,
        end_tokens: Collection[int] = (),
    ) -> None:
        self._text = list(text)
        self._tables = tables
        self._statistics = statistics
        self._end_tokens = end_tokens
        self._next: dict[tuple[int, ...], int] = {}  # by 1, 2 or 3 tokens: the one that followed them last
        for length in range(1, MAX_CONTEXT + 1):
            contexts = zip(*(text[start:] for start in range(length)), strict=False)
            self._next.update(zip(contexts, text[length:], strict=False))

    def append(self, token: int) -> None:
        """Adds a token to the text."""
        tail = tuple(self._text[-MAX_CONTEXT:])
        for start in range(len(tail)):
            self._next[tail[start:]] = token
        self._text.append(token)

    def propose(self, limit: int, min_rate: float = 0.0) -> list[DraftToken]:
        """Returns the likeliest continuation, at most `limit` tokens.

        Each token is proposed as if all before it were accepted. min_rate: the search ends where the probability that a token and
        all before it are accepted falls below this. The first token is proposed in any case.
        """
        drafts: list[DraftToken] = []
        tail = tuple(self._text[-MAX_CONTEXT:])
        reached = 1.0
        while len(drafts) < limit:
            draft = self._propose_next(tail)
            if draft is None or draft.token in self._end_tokens:
                break
            reached *= draft.rate
            if drafts and reached < min_rate:
                break
            drafts.append(draft)
            tail = (*tail[-MAX_CONTEXT + 1 :], draft.token)
        return drafts

    def _propose_next(self, tail: tuple[int, ...]) -> DraftToken | None:
        context, token = find_longest(self._next, tail)
        best = None if token is None else self._statistics.rate_text_match(token, len(context))
        for table in self._tables:
            entry = table.find(tail)
            if entry is not None:
                draft = self._statistics.rate_table_entry(*entry, agrees=entry[0] == token)
                if best is None or draft.rate > best.rate:
                    best = draft
        return best
