"""Readers of a text into a KV cache: alone, with draft tokens, or in steps that requests share.

They return the logits of its positions.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from edgelora_runtime.batching.batch import Row
from edgelora_runtime.session.in_place_cache import InPlaceCache
from edgelora_runtime.session.model import PREFILL_CHUNK
from edgelora_runtime.session.step_costs import MAX_DRAFT_TOKENS, StepCosts, choose_length, count_likely, find_break_even

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    from edgelora_runtime.batching.batch import Batch
    from edgelora_runtime.decode.drafter import AcceptanceStatistics, Drafter, DraftToken
    from edgelora_runtime.session.factors import LoraInputs
    from edgelora_runtime.session.kv_cache import KVCache
    from edgelora_runtime.session.model import Model

    Floats = NDArray[np.float32]
    EstimateCosts = Callable[[StepCosts, int, int], list[float]]


class Reader:
    """A reader of one request's tokens, with its model, KV cache and LoRA inputs."""

    drafted = accepted = 0  # draft tokens that were read, and how many of them were accepted

    def __init__(self, model: Model, cache: KVCache, live: LoraInputs | None) -> None:
        self.model = model
        self.cache = cache
        self.live = live

    def reserve(self, positions: int) -> None:
        """Makes room for that many positions at once, so that no step has to."""
        self.model.reserve(self.cache, positions)

    def skip_prompt(self) -> None:
        """Records that the cache holds the whole prompt, and that read() gets the tokens of the answer only."""

    def leave(self) -> None:
        """Leaves the steps that it shares with other requests, if it does. The cache then holds all that was read."""

    def read(self, tokens: Sequence[int], room: int, check: Callable[[], None]) -> Floats:  # noqa: ARG002  (room for draft tokens)
        """Appends tokens to the cache and returns the logits (V,) after the last one.

        The next call overwrites them. room: how many more tokens the request can use. check: called before each step. It may
        raise to end here.
        """
        logits: Floats = self.model.read(self.cache, tokens, live=self.live, check=check)[0]
        return logits


class SpeculatingReader(Reader):
    """A reader that reads draft tokens along.

    One step then gives the logits of several positions. Each token is drawn from the logits of its own position, one after
    another, as without draft tokens. A draft token only decides whether these logits are there already. It is therefore accepted
    with the probability that the model gives it, and where it is rejected, the draw is one of the other tokens. This is
    speculative sampling (arXiv 2211.17192, section 2.3) for a draft model that is certain of its tokens, and it uses random
    numbers exactly as decoding without drafts does. The cache's tokens are only those that were drawn. Keys and values of
    rejected draft tokens follow theirs until they are overwritten.

    onnxruntime's kernels for one row, both of int4 products with AVX2 and of attention, round differently from those for several
    rows, which agree with each other for any number of rows. With min_rows = MIN_ROWS no step has one row: a step without draft
    tokens reads the token before its own once more. Draft tokens then change no bit of an answer, though an answer without
    speculation can differ where two tokens are nearly equally likely. With min_rows = 1, steps without draft tokens are faster,
    but the draft decides which kernels compute the next token.

    plain: the reader that this one replaces. estimate: seconds of steps by number of draft tokens, as StepCosts.estimate().
    """

    def __init__(
        self,
        plain: Reader,
        drafter: Drafter,
        statistics: AcceptanceStatistics,
        *,
        min_rows: int,
        estimate: EstimateCosts = StepCosts.estimate,
    ) -> None:
        super().__init__(plain.model, plain.cache, plain.live)
        self._drafter = drafter
        self._statistics = statistics
        self._min_rows = min_rows
        self._estimate = estimate
        self._drafts: list[
            DraftToken
        ] = []  # proposed for the positions after the last step's tokens; that step read the first ones
        self._logits: Sequence[Floats] = ()  # after those tokens, and after each draft token that was read
        self._at = 0  # the row of _logits that was returned last
        self._is_prompt = True

    def skip_prompt(self) -> None:
        self._is_prompt = False

    def read(self, tokens: Sequence[int], room: int, check: Callable[[], None]) -> Floats:
        started = time.perf_counter()
        if not self._is_prompt:
            self._drafter.append(tokens[-1])
        if self._at < len(self._drafts):
            draft = self._drafts[self._at]
            self._statistics.record(draft, tokens[-1])
            self._at += 1
            if draft.token == tokens[-1] and self._at < len(self._logits):
                self.accepted += 1
                self.cache.extend(tokens)
                self._record_cost(time.perf_counter() - started)
                return self._logits[self._at]
        self._drafts, self._at, self._is_prompt = [], 0, False
        limit = min(room, MAX_DRAFT_TOKENS, -len(tokens) % PREFILL_CHUNK)  # in one chunk with the last token
        seconds = self._estimate(self.model.costs, limit, self._min_rows)
        drafted = self._draft(limit, seconds, follows_prompt=len(tokens) > 1)
        if seconds:  # without the prompt's own rows, which every request reads
            self._record_cost(time.perf_counter() - started + seconds[len(drafted)])
        self._logits = self._step(tokens, drafted, check)
        self.drafted += len(drafted)
        return self._logits[0]

    def _draft(self, limit: int, seconds: list[float], *, follows_prompt: bool) -> list[int]:
        """Returns as many draft tokens as pay, and now and then another number.

        Those that are not read still serve the statistics. seconds: of steps with 0 to `limit` draft tokens. After a prompt, a
        draft token costs only its own row, since the rest of the step is needed anyway.
        """
        break_even = find_break_even(seconds)
        self._drafts = self._drafter.propose(limit, break_even)
        rates = [draft.rate for draft in self._drafts]
        if follows_prompt:
            count = count_likely(rates, break_even) if seconds else 0
        else:
            count = self.model.costs.probe(choose_length(rates, seconds), len(rates))
        return [draft.token for draft in self._drafts[:count]]

    def _record_cost(self, seconds: float) -> None:
        """Records the cost of the newest token.

        Does nothing until the cost of a plain step is known to compare it with.
        """
        if self.model.costs.plain is not None:
            self._statistics.record_cost(seconds / self.model.costs.plain)

    def _step(self, tokens: Sequence[int], drafted: Sequence[int], check: Callable[[], None]) -> list[Floats]:
        """Returns the logits after the tokens and after each draft token.

        The cache's tokens do not include the draft.
        """
        rows = [*tokens, *drafted]
        if len(rows) < self._min_rows and self.cache.tokens:
            rows.insert(0, self.cache.tokens[-1])
            self.cache.rewind(len(self.cache.tokens) - 1)
        keep = max(len(drafted) + 1, min(len(rows), self._min_rows))  # the head, too, has a kernel for one row
        logits = self.model.read(self.cache, rows, live=self.live, keep=keep, check=check)
        self.cache.rewind(len(self.cache.tokens) - len(drafted))
        return list(logits[keep - len(drafted) - 1 :])


class SharedReader(Reader):
    """A reader that reads its prompt alone, and each token of the answer together with other requests, if there are any.

    Alone it reads as the reader that it replaces, with draft tokens if that one has them. In a batch it reads none: a step has
    one token of each text.

    alone: the reader that it replaces. batch: what it joins as soon as another request may. None if it always reads alone. At the
    end of a `with` block, it leaves the batch.
    """

    def __init__(self, alone: Reader, batch: Batch | None) -> None:
        super().__init__(alone.model, alone.cache, alone.live)
        self._alone = alone
        self._batch = batch
        self._row: Row | None = None
        self._positions = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.leave()

    def reserve(self, positions: int) -> None:
        self._positions = min(positions, self.model.entry.context_length)
        self._alone.reserve(positions)

    def skip_prompt(self) -> None:
        self._alone.skip_prompt()

    def read(self, tokens: Sequence[int], room: int, check: Callable[[], None]) -> Floats:
        batch = self._batch
        if batch is not None and len(tokens) == 1 and self.cache.tokens and (self._row is not None or batch.readers > 1):
            check()
            logits = self._read_shared(batch, tokens[0])
            if logits is not None:
                self.cache.extend(tokens)
                return logits
        self.leave()
        logits = self._alone.read(tokens, room, check)
        self.drafted, self.accepted = self._alone.drafted, self._alone.accepted
        return logits

    def leave(self) -> None:
        if self._row is not None and self._batch is not None:
            self._batch.leave(self._row)
            self._row = None

    def _read_shared(self, batch: Batch, token: int) -> Floats | None:
        """Reads a token in a step of the batch. Returns None if the batch has no room."""
        if self._row is not None and self._row.length != len(self.cache.tokens):  # a context shift dropped some
            self.leave()
        if self._row is None:
            assert isinstance(self.cache, InPlaceCache)
            self._row = Row(self.cache, self.live, max(self._positions, len(self.cache.tokens) + 1))
        logits = batch.read(self._row, token)
        if logits is None:
            self._row = None
        return logits
