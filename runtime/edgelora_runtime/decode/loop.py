"""The decode loop, which takes a prompt's tokens, yields pieces of text, and reports their cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_runtime.bundle.tokenizer import IncrementalDecoder
from edgelora_runtime.decode.cancellation import GenerationCancelled
from edgelora_runtime.decode.logprobs import TokenLogprob, rate_token
from edgelora_runtime.decode.sampling import Sampler
from edgelora_runtime.session.kv_cache import shared_prefix

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator, Sequence

    from edgelora_runtime.bundle.router import Route
    from edgelora_runtime.bundle.tokenizer import Tokenizer
    from edgelora_runtime.decode.cancellation import Cancellation
    from edgelora_runtime.decode.reader import Reader
    from edgelora_runtime.decode.request import Request

_SINKS = 4  # first tokens that a context shift keeps: as many as the paper finds necessary


@dataclass(frozen=True)
class Receipt:
    """The cost of a switch.

    milliseconds: from the call until the variant can run. cold: whether its session had to be created. bytes_mapped: bytes of the
    blobs and adapters that were opened for it. kv_reused_tokens: tokens of earlier requests that its KV cache still holds.
    """

    variant: str
    milliseconds: float
    cold: bool
    bytes_mapped: int
    kv_reused_tokens: int


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    tokens: what the model wrote, without the end token. finish_reason: "stop" (an end token, a stop string, or the end of a
    constraint), "length", "cancelled" or "timeout". reused_tokens: tokens of the prompt that came from the KV cache. prefill_ms:
    time to read the rest of the prompt and write the first token. decode_ms: time to write all others. route: the router's choice
    of variant, if the request said "auto". dropped_tokens: tokens that context shifts dropped. logprobs: one per token, if
    requested. drafted_tokens: draft tokens that steps read along. accepted_tokens: the number of these that were accepted. Each
    saved a step.
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


class TextStream:
    """An iterator over pieces of text, each of whole characters.

    `generation` is set once the iterator is exhausted. `async for` works like `for` and runs each step in a thread. Cancelling
    the task ends the generation.
    """

    def __init__(self, pieces: Generator[str, None, Generation], cancellation: Cancellation) -> None:
        self.generation: Generation | None = None
        self._pieces = pieces
        self._cancellation = cancellation

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
        import asyncio  # costs a tenth of the package's import time, and few callers await

        try:
            piece = await asyncio.to_thread(next, self, None)  # StopIteration cannot cross a future
        except asyncio.CancelledError:
            self.cancel()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    def cancel(self) -> None:
        """Ends the generation before its next step. Safe from any thread.

        The text so far is the answer.
        """
        self._cancellation.cancel()

    def close(self) -> None:
        """Ends the generation and drops the answer. The KV cache keeps what was read so far."""
        self._pieces.close()


def continue_prompt(
    request: Request,
    receipt: Receipt,
    tokenizer: Tokenizer,
    reader: Reader,
) -> Generator[str, None, Generation]:
    """Reads the part of the prompt that the cache lacks, then writes token by token.

    Yields text and returns the Generation.
    """
    started = first_token = time.perf_counter()
    cache = reader.cache
    reused = min(shared_prefix(cache.tokens, request.prompt), len(request.prompt) - 1)
    cache.rewind(reused)
    reader.reserve(len(request.prompt) + request.max_tokens)
    sampler = Sampler(request.sampling, request.prompt)
    constraint, stop = request.constraint, request.stop
    decoder = IncrementalDecoder(tokenizer, keep_space=constraint is not None, kept=request.kept_tokens)
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    shown: list[str] = []
    unread, reason, dropped = list(request.prompt[reused:]), "length", 0
    while len(tokens) < request.max_tokens:
        if len(cache.tokens) + len(unread) > request.context:
            text = [*cache.tokens, *unread]
            kept = _shift_context(text, request.context, request.max_tokens - len(tokens))
            dropped += len(text) - len(kept)
            cache.rewind(shared_prefix(cache.tokens, kept))
            unread = kept[len(cache.tokens) :]
        try:
            room = min(request.max_tokens - len(tokens) - 1, request.context - len(cache.tokens) - len(unread))
            logits = reader.read(unread, room, request.cancellation.check)
        except GenerationCancelled as cancelled:
            reason = cancelled.reason
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
    # What was held back: an unfinished character, and text that could have become a stop string.
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


def _shift_context(text: Sequence[int], context: int, more: int) -> list[int]:
    """Shortens a text that outgrew the context.

    Afterwards `more` tokens fit, up to half a context. The first tokens stay, since attention rests on them (arXiv 2309.17453,
    section 3.1), and so do the last. The middle is dropped.
    """
    kept = min(context, context - min(more, context // 2) + 1)  # the last token is never read back
    first = min(_SINKS, kept // 2)
    return [*text[:first], *text[len(text) - (kept - first) :]]
