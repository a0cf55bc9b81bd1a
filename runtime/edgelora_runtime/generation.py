"""The decode loop: prompt tokens in, text pieces out, and an account of what it cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_runtime.cache import shared_prefix
from edgelora_runtime.sampling import Sampler
from edgelora_runtime.tokenizer import IncrementalDecoder

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from edgelora_runtime.cache import KVCache
    from edgelora_runtime.live import LoraInputs
    from edgelora_runtime.model import Model
    from edgelora_runtime.router import Route
    from edgelora_runtime.sampling import Sampling
    from edgelora_runtime.streaming import StopFilter
    from edgelora_runtime.tokenizer import Tokenizer


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

    tokens: what the model wrote, without the end token. finish_reason: stop (an end token or a stop string) or length.
    reused_tokens: of the prompt, read from the KV cache. prefill_ms reads the rest of the prompt and gives the first
    token; decode_ms gives all others. route: how the variant was chosen, where it was "auto".
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


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it, once: the stop filter has a state.

    end_tokens: the model's own. route: as in Generation.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: StopFilter
    end_tokens: frozenset[int]
    route: Route | None = None


class TextStream:
    """An iterator over pieces of text that are whole characters; `generation` is there once it is exhausted."""

    def __init__(self, pieces: Generator[str, None, Generation]) -> None:
        self.generation: Generation | None = None
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self.generation = end.value
            raise

    def close(self) -> None:
        """Ends the generation early; what was read so far stays in the KV cache."""
        self._pieces.close()


def continue_prompt(
    request: Request,
    receipt: Receipt,
    tokenizer: Tokenizer,
    model: Model,
    cache: KVCache,
    live: LoraInputs | None,
) -> Generator[str, None, Generation]:
    """Reads what the cache lacks of the prompt, then writes token by token; yields text, returns the account."""
    started = first_token = time.perf_counter()
    reused = min(shared_prefix(cache.tokens, request.prompt), len(request.prompt) - 1)
    cache.rewind(reused)
    model.reserve(cache, len(request.prompt) + request.max_tokens)
    sampler = Sampler(request.sampling, request.prompt)
    decoder, stop = IncrementalDecoder(tokenizer), request.stop
    tokens: list[int] = []
    shown: list[str] = []
    unread, ended = list(request.prompt[reused:]), False
    while not ended and len(tokens) < request.max_tokens:
        token = sampler.draw(model.read(cache, unread, live=live)[0])
        if not tokens:
            first_token = time.perf_counter()
        if token in request.end_tokens:
            ended = True
            break
        tokens.append(token)
        unread = [token]
        if piece := stop.push(decoder.push(token)):
            shown.append(piece)
            yield piece
        ended = stop.stopped
    # Not before the end: an unfinished character, and text that might have become a stop string.
    if piece := stop.push(decoder.flush()) + stop.flush():
        shown.append(piece)
        yield piece
    finished = time.perf_counter()
    return Generation(
        text="".join(shown),
        tokens=tuple(tokens),
        finish_reason="stop" if ended or stop.stopped else "length",
        variant=receipt.variant,
        prompt_tokens=len(request.prompt),
        reused_tokens=reused,
        prefill_ms=(first_token - started) * 1e3,
        decode_ms=(finished - first_token) * 1e3,
        receipt=receipt,
        route=request.route,
    )
