"""The decode loop: prompt tokens in, text pieces out, and an account of what it cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_runtime.bundle.tokenizer import IncrementalDecoder
from edgelora_runtime.decode.cancellation import InterruptedGeneration
from edgelora_runtime.decode.logprobs import TokenLogprob, rate_token
from edgelora_runtime.decode.sampling import Sampler
from edgelora_runtime.session.kv_cache import shared_prefix

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator, Sequence

    from edgelora_runtime.bundle.router import Route
    from edgelora_runtime.bundle.tokenizer import Tokenizer
    from edgelora_runtime.decode.cancellation import Interruption
    from edgelora_runtime.decode.grammar import Constraint
    from edgelora_runtime.decode.reader import Reader
    from edgelora_runtime.decode.sampling import Sampling
    from edgelora_runtime.decode.stop_strings import StopFilter

_SINKS = 4  # first tokens that stay when a context slides: as many as the paper finds to be enough


@dataclass(frozen=True)
class Receipt:
    """What a switch cost.

    milliseconds: from the call until the variant can run. cold: its session had to be created. bytes_mapped: of blobs
    and adapters that were opened for it. kv_reused_tokens: tokens of earlier requests whose KV cache it still holds.
    """

    variant: str
    milliseconds: float
    cold: bool
    bytes_mapped: int
    kv_reused_tokens: int


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    tokens: what the model wrote, without the end token. finish_reason: stop (an end token, a stop string, or the end of what
    the answer had to fit), length, cancelled or timeout. reused_tokens: of the prompt, read from the KV cache. prefill_ms
    reads the rest of the prompt and gives the first token; decode_ms gives all others. route: how the variant was chosen,
    where it was "auto". dropped_tokens: what was left out of the middle so that the context could slide on. logprobs: one per
    token, where they were asked for. drafted_tokens: guesses that steps read along. accepted_tokens: those of them that came
    true, each of which saved a step.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    variant: str
    prompt_tokens: int
    reused_tokens: int
    prefill_ms: float
    decode_ms: float
    receipt: Receipt
    route: Route | None = None
    dropped_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it, once: the stop filter and the interruption have a state.

    end_tokens: the model's own. context: tokens that the model may see at once; a text that grows longer loses its middle, and
    one that must not has a max_tokens that fits. route: as in Generation. logprobs: how many alternatives to give for each token,
    0 for no log probabilities at all. constraint: what the answer has to fit, which has a state, too.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: StopFilter
    end_tokens: frozenset[int]
    context: int
    interruption: Interruption
    route: Route | None = None
    logprobs: int = 0
    constraint: Constraint | None = None


class TextStream:
    """An iterator over pieces of text that are whole characters; `generation` is there once it is exhausted.

    `async for` works as `for` does, with each step in a thread of its own; a task that is cancelled ends the generation.
    """

    def __init__(self, pieces: Generator[str, None, Generation], interruption: Interruption) -> None:
        self.generation: Generation | None = None
        self._pieces = pieces
        self._interruption = interruption

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self.generation = end.value
            raise

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        import asyncio  # a tenth of the time to import all else, and few await

        try:
            piece = await asyncio.to_thread(next, self, None)  # StopIteration cannot cross a future
        except asyncio.CancelledError:
            self.cancel()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    def cancel(self) -> None:
        """Ends the generation before its next step, from any thread; what was written so far is the answer."""
        self._interruption.cancel()

    def close(self) -> None:
        """Ends the generation and drops the answer; what was read so far stays in the KV cache."""
        self._pieces.close()


def continue_prompt(
    request: Request,
    receipt: Receipt,
    tokenizer: Tokenizer,
    reader: Reader,
) -> Generator[str, None, Generation]:
    """Reads what the cache lacks of the prompt, then writes token by token; yields text, returns the account."""
    started = first_token = time.perf_counter()
    cache = reader.cache
    reused = min(shared_prefix(cache.tokens, request.prompt), len(request.prompt) - 1)
    cache.rewind(reused)
    reader.reserve(len(request.prompt) + request.max_tokens)
    sampler = Sampler(request.sampling, request.prompt)
    constraint, stop = request.constraint, request.stop
    decoder = IncrementalDecoder(tokenizer, keep_space=constraint is not None)
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    shown: list[str] = []
    unread, reason, dropped = list(request.prompt[reused:]), "length", 0
    while len(tokens) < request.max_tokens:
        if len(cache.tokens) + len(unread) > request.context:
            text = [*cache.tokens, *unread]
            kept = _slide(text, request.context, request.max_tokens - len(tokens))
            dropped += len(text) - len(kept)
            cache.rewind(shared_prefix(cache.tokens, kept))
            unread = kept[len(cache.tokens) :]
        try:
            room = min(request.max_tokens - len(tokens) - 1, request.context - len(cache.tokens) - len(unread))
            logits = reader.read(unread, room, request.interruption.check)
        except InterruptedGeneration as interrupted:
            reason = interrupted.reason
            break
        token = sampler.draw(logits if constraint is None else constraint.mask(logits))
        if not tokens:
            first_token = time.perf_counter()
        if token in request.end_tokens:
            reason = "stop"
            break
        tokens.append(token)
        if request.logprobs:
            logprobs.append(rate_token(logits, token, request.logprobs))
        unread = [token]
        if piece := stop.push(decoder.push(token)):
            shown.append(piece)
            yield piece
        if stop.stopped or (constraint is not None and not constraint.advance(token)):
            reason = "stop"
            break
    # Not before the end: an unfinished character, and text that might have become a stop string.
    if piece := stop.push(decoder.flush()) + stop.flush():
        shown.append(piece)
        yield piece
    finished = time.perf_counter()
    return Generation(
        text="".join(shown),
        tokens=tuple(tokens),
        finish_reason="stop" if stop.stopped else reason,
        variant=receipt.variant,
        prompt_tokens=len(request.prompt),
        reused_tokens=reused,
        prefill_ms=(first_token - started) * 1e3,
        decode_ms=(finished - first_token) * 1e3,
        receipt=receipt,
        route=request.route,
        dropped_tokens=dropped,
        logprobs=tuple(logprobs),
        drafted_tokens=reader.drafted,
        accepted_tokens=reader.accepted,
    )


def _slide(text: Sequence[int], context: int, more: int) -> list[int]:
    """What stays of a text that outgrew the context, so that as many tokens more fit, up to half a context.

    The first ones stay, since attention rests on them (arXiv 2309.17453, section 3.1), and the last; the middle goes.
    """
    kept = min(context, context - min(more, context // 2) + 1)  # the last token is never read back
    first = min(_SINKS, kept // 2)
    return [*text[:first], *text[len(text) - (kept - first) :]]
