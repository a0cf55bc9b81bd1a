"""A finished answer, with its tokens, its log probabilities, and what it and the switch before it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgelora_runtime.bundle.router import Route

_SHOWN = 60  # characters of an answer in its repr


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was written and its natural log probability.

    top: (token, log probability) of the likeliest tokens, likeliest first. The written token appears only if it is one of them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        state = "cold" if self.cold else "warm"
        return (
            f"<Receipt: {self.variant} in {self.milliseconds:.1f} ms ({state}), {self.bytes_mapped} bytes mapped, "
            f"{self.kv_reused_tokens} tokens cached>"
        )


@dataclass(frozen=True)
class Usage:
    """The tokens of a request, and its speed.

    prompt_tokens: of the whole prompt. cached_tokens: those of the prompt that were not read, since a KV cache held them.
    completion_tokens: of the answer, without the end token. tokens_per_second: of the answer, from its second token on. It is 0
    for fewer than two tokens. In a stream, the caller's own time between two pieces counts.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    tokens_per_second: float

    @property
    def total_tokens(self) -> int:
        """The tokens of prompt and answer."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, repr=False)
class Generation:
    """A finished answer. As a string, it is its text.

    tokens: what the model wrote, without the end token. finish_reason: "stop" (an end token, a stop string, or the end of a
    constraint), "length", "cancelled" or "timeout". reused_tokens: tokens of the prompt that came from the KV cache. prefill_ms:
    time to read the rest of the prompt and write the first token. decode_ms: time to write all others. route: the router's choice
    of variant, if the request said "auto". dropped_tokens: tokens that context shifts dropped. logprobs: one per token, if
    requested. drafted_tokens: draft tokens that steps read along. accepted_tokens: the number of these that were accepted. Each
    saved a step. alternatives: the other answers to the same prompt, if the request asked for several.
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
    alternatives: tuple[Generation, ...] = ()

    @property
    def usage(self) -> Usage:
        """The tokens of prompt and answer, and the speed of this answer."""
        later = len(self.tokens) - 1
        speed = later / self.decode_ms * 1e3 if later > 0 and self.decode_ms > 0 else 0.0
        return Usage(self.prompt_tokens, self.reused_tokens, len(self.tokens), speed)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= _SHOWN else self.text[: _SHOWN - 1] + "…"
        more = f", {len(self.alternatives)} alternatives" if self.alternatives else ""
        return (
            f"<Generation {text!r}: {len(self.tokens)} tokens by {self.variant}, {self.finish_reason}, "
            f"{self.usage.tokens_per_second:.1f} tokens/s{more}>"
        )
