"""Reads a text into a KV cache and hands out the logits of its positions, some of them from guesses that came true."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from edgelora_runtime.session.model import PREFILL_CHUNK
from edgelora_runtime.session.step_costs import MOST_GUESSES, choose_length, count_likely, find_least_chance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from edgelora_runtime.decode.drafter import Drafter, Experience, Guess
    from edgelora_runtime.session.factors import LoraInputs
    from edgelora_runtime.session.kv_cache import KVCache
    from edgelora_runtime.session.model import Model

    Floats = NDArray[np.float32]


class Reader:
    """One request's way to its model."""

    drafted = accepted = 0  # guesses that were read, and those of them that came true

    def __init__(self, model: Model, cache: KVCache, live: LoraInputs | None) -> None:
        self.cache = cache
        self._model = model
        self._live = live

    def reserve(self, positions: int) -> None:
        """Makes room for that many positions at once, so that no step has to."""
        self._model.reserve(self.cache, positions)

    def read(self, tokens: Sequence[int], room: int, check: Callable[[], None]) -> Floats:  # noqa: ARG002  (room for guesses)
        """Appends tokens to the cache; returns the logits (V,) behind them, which the next call overwrites.

        room: for how many further tokens there is use. check: called before each step, may raise to end here.
        """
        logits: Floats = self._model.read(self.cache, tokens, live=self._live, check=check)[0]
        return logits


class SpeculatingReader(Reader):
    """Appends guesses to what it reads, so that one step gives the logits of several positions.

    What is drawn is drawn from the logits of its own position, one after another, as without guesses: a guess only decides
    whether these are there already. So it is right with the probability that the model gives it, and where it is wrong the
    draw was one of all other tokens: what speculative sampling (arXiv 2211.17192, section 2.3) comes to for certain guesses,
    with the same use of random numbers as without. The cache's tokens are only ever what was drawn; keys and values of
    wrong guesses lie behind them, until they are overwritten.

    onnxruntime's kernels for one row, of int4 products by AVX2 and of attention, give other last bits than those for several
    rows, which agree with each other whatever their number. With least_rows = LEAST_ROWS no step here has one row: one without
    a guess reads the token before once more. Then guesses change no bit of an answer; beside an answer without speculation it
    can differ where two tokens are nearly equally likely. With 1 a step without a guess is faster, and guesses decide which
    kernels the next token comes from.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        live: LoraInputs | None,
        drafter: Drafter,
        experience: Experience,
        least_rows: int,
    ) -> None:
        super().__init__(model, cache, live)
        self._drafter = drafter
        self._experience = experience
        self._least_rows = least_rows
        self._guesses: list[Guess] = []  # from the position behind the last step's tokens on; the first ones were read with them
        self._logits: Sequence[Floats] = ()  # behind those tokens, and behind each guess that was read
        self._at = 0  # the row of these that was handed out last
        self._is_prompt = True

    def read(self, tokens: Sequence[int], room: int, check: Callable[[], None]) -> Floats:
        started = time.perf_counter()
        if not self._is_prompt:
            self._drafter.append(tokens[-1])
        if self._at < len(self._guesses):
            guess = self._guesses[self._at]
            self._experience.learn(guess, tokens[-1])
            self._at += 1
            if guess.token == tokens[-1] and self._at < len(self._logits):
                self.accepted += 1
                self.cache.extend(tokens)
                self._note_cost(time.perf_counter() - started)
                return self._logits[self._at]
        self._guesses, self._at, self._is_prompt = [], 0, False
        most = min(room, MOST_GUESSES, -len(tokens) % PREFILL_CHUNK)  # in one chunk with the last token
        seconds = self._model.costs.estimate(most, self._least_rows)
        draft = self._draft(most, seconds, follows_prompt=len(tokens) > 1)
        if seconds:  # a prompt's own rows, which any request reads, are left out
            self._note_cost(time.perf_counter() - started + seconds[len(draft)])
        self._logits = self._step(tokens, draft, check)
        self.drafted += len(draft)
        return self._logits[0]

    def _draft(self, most: int, seconds: list[float], *, follows_prompt: bool) -> list[int]:
        """As many guesses as pay, and now and then another number; whatever else was guessed is kept to learn from.

        seconds: of steps with 0 to `most` of them. Behind a prompt each costs its own row alone, as the rest is read anyway.
        """
        least_chance = find_least_chance(seconds)
        self._guesses = self._drafter.guess(most, least_chance)
        chances = [guess.chance for guess in self._guesses]
        if follows_prompt:
            chosen = count_likely(chances, least_chance) if seconds else 0
        else:
            chosen = self._model.costs.probe(choose_length(chances, seconds), len(chances))
        return [guess.token for guess in self._guesses[:chosen]]

    def _note_cost(self, seconds: float) -> None:
        """What the latest token took, as far as it is known how that compares."""
        if self._model.costs.plain is not None:
            self._experience.note_cost(seconds / self._model.costs.plain)

    def _step(self, tokens: Sequence[int], draft: Sequence[int], check: Callable[[], None]) -> list[Floats]:
        """The logits behind the tokens and behind each of the draft, which the cache then does not count among its own."""
        rows = [*tokens, *draft]
        if len(rows) < self._least_rows and self.cache.tokens:
            rows.insert(0, self.cache.tokens[-1])
            self.cache.rewind(len(self.cache.tokens) - 1)
        keep = max(len(draft) + 1, min(len(rows), self._least_rows))  # the head, too, has a kernel for one row
        logits = self._model.read(self.cache, rows, live=self._live, keep=keep, check=check)
        self.cache.rewind(len(self.cache.tokens) - len(draft))
        return list(logits[keep - len(draft) - 1 :])
