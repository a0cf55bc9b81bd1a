"""The decode loop, which takes a prompt's tokens, yields pieces of text, and reports their cost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from edgelora_runtime.answers.generation import Generation
from edgelora_runtime.answers.text_stream import Piece
from edgelora_runtime.bundle.tokenizer import IncrementalDecoder
from edgelora_runtime.decode.cancellation import GenerationCancelled
from edgelora_runtime.decode.logprobs import rate_token
from edgelora_runtime.decode.sampling import Sampler
from edgelora_runtime.errors import IntegrityError
from edgelora_runtime.session.kv_cache import shared_prefix

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from numpy.typing import NDArray

    from edgelora_runtime.answers.generation import Receipt, TokenLogprob
    from edgelora_runtime.bundle.tokenizer import Tokenizer
    from edgelora_runtime.decode.reader import Reader
    from edgelora_runtime.decode.request import Request
    from edgelora_runtime.session.kv_cache import KVCache

    Floats = NDArray[np.float32]

_SINKS = 4  # first tokens that a context shift keeps: as many as the paper finds necessary


class PromptEnd:
    """The state right after a prompt, from which several answers start.

    tokens: those that the KV cache holds then. logits: float32 (V,), None until the prompt has been read.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logits: Floats | None = None

    def record(self, cache: KVCache, logits: Floats) -> None:
        """Copies the tokens of a cache that has just read the prompt, and the logits after it."""
        self.tokens, self.logits = list(cache.tokens), logits.copy()

    def is_in(self, cache: KVCache) -> bool:
        """True if a cache still starts with the keys and values of the prompt."""
        return self.logits is not None and cache.tokens[: len(self.tokens)] == self.tokens


def continue_prompt(
    request: Request,
    receipt: Receipt,
    tokenizer: Tokenizer,
    reader: Reader,
    prompt_end: PromptEnd | None = None,
) -> Generator[Piece, None, Generation]:
    """Reads the part of the prompt that the cache lacks, then writes token by token.

    Yields pieces, the last of which has the finish_reason, and returns the Generation. prompt_end: for the first of several
    answers an empty one, which is filled. The next ones start from it.
    """
    started = first_token = time.perf_counter()
    cache = reader.cache
    sampler = Sampler(request.sampling, request.prompt)
    constraint, stop = request.constraint, request.stop
    mask = None if constraint is None else constraint.mask
    decoder = IncrementalDecoder(tokenizer, keep_space=constraint is not None, kept=request.kept_tokens)
    answer = _Answer(request.index)
    if prompt_end is not None and prompt_end.is_in(cache):
        first_logits, reused = prompt_end.logits, len(request.prompt)
        cache.rewind(len(prompt_end.tokens))
        reader.skip_prompt()
    else:
        first_logits, reused = None, min(shared_prefix(cache.tokens, request.prompt), len(request.prompt) - 1)
        cache.rewind(reused)
    reader.reserve(len(request.prompt) + request.max_tokens)
    unread, reason, dropped, text = list(request.prompt[reused:]), "length", 0, ""
    while True:
        if len(cache.tokens) + len(unread) > request.context:
            held = [*cache.tokens, *unread]
            kept = _shift_context(held, request.context, request.max_tokens - len(answer.tokens))
            dropped += len(held) - len(kept)
            cache.rewind(shared_prefix(cache.tokens, kept))
            unread = kept[len(cache.tokens) :]
        try:
            if first_logits is None:
                room = min(request.max_tokens - len(answer.tokens) - 1, request.context - len(cache.tokens) - len(unread))
                logits = reader.read(unread, room, request.cancellation.check)
            else:
                request.cancellation.check()
                logits, first_logits = first_logits, None
        except GenerationCancelled as cancelled:
            reason = cancelled.reason
            break
        check_finite(logits, "logits")
        if prompt_end is not None and prompt_end.logits is None:
            prompt_end.record(cache, logits)
        token = sampler.draw(logits, mask)
        if not answer.tokens:
            first_token = time.perf_counter()
        if token in request.end_tokens:
            reason = "stop"
            break
        answer.append(token, rate_token(logits, token, request.logprobs) if request.logprobs else None)
        unread = [token]
        text = stop.push(decoder.push(token))
        if stop.stopped or (constraint is not None and not constraint.advance(token)):
            reason = "stop"
            break
        if len(answer.tokens) == request.max_tokens:
            break
        if text:
            yield answer.show(text)
            text = ""
    # What was held back: an unfinished character, and text that could have become a stop string.
    text += stop.push(decoder.flush()) + stop.flush()
    finished = time.perf_counter()
    yield answer.show(text, "stop" if stop.stopped else reason)
    return Generation(
        text="".join(answer.shown),
        tokens=tuple(answer.tokens),
        finish_reason="stop" if stop.stopped else reason,
        variant=receipt.variant,
        prompt_tokens=len(request.prompt),
        reused_tokens=reused,
        prefill_ms=(first_token - started) * 1e3,
        decode_ms=(finished - first_token) * 1e3,
        receipt=receipt,
        route=request.route,
        dropped_tokens=dropped,
        logprobs=tuple(answer.logprobs),
        drafted_tokens=reader.drafted,
        accepted_tokens=reader.accepted,
    )


def check_finite(computed: Floats, what: str) -> Floats:
    """Returns what a graph computed, unless it holds NaN or infinity, or nothing but zeros. Raises IntegrityError for these.

    Zeros are what a norm makes of numbers whose squares are infinite.
    """
    with np.errstate(all="ignore"):
        total = computed.sum()  # one pass: NaN and infinity stay in a sum
    if not np.isfinite(total) or (total == 0 and not computed.any()):
        raise IntegrityError(
            f"the model computed {what} that are NaN, infinite or all zero; use smaller weights in the mix, or verify the bundle"
        )
    return computed


class _Answer:
    """An answer as it grows: its tokens, and the part of it that pieces have shown."""

    def __init__(self, index: int) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.shown: list[str] = []
        self._index = index
        self._handed = 0  # tokens that earlier pieces carry

    def append(self, token: int, logprob: TokenLogprob | None) -> None:
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)

    def show(self, text: str, finish_reason: str | None = None) -> Piece:
        """Makes the next piece, which carries the tokens since the one before."""
        tokens, logprobs = tuple(self.tokens[self._handed :]), tuple(self.logprobs[self._handed :])
        self._handed = len(self.tokens)
        self.shown.append(text)
        return Piece(text, tokens=tokens, logprobs=logprobs, finish_reason=finish_reason, answer=self._index)


def _shift_context(text: Sequence[int], context: int, more: int) -> list[int]:
    """Shortens a text that outgrew the context.

    Afterwards `more` tokens fit, up to half a context. The first tokens stay, since attention rests on them (arXiv 2309.17453,
    section 3.1), and so do the last. The middle is dropped.
    """
    kept = min(context, context - min(more, context // 2) + 1)  # the last token is never read back
    first = min(_SINKS, kept // 2)
    return [*text[:first], *text[len(text) - (kept - first) :]]
