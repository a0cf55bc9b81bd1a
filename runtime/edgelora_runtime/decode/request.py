"""One request: its prompt's tokens, and the options for continuing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_runtime.decode.sampling import Sampling
from edgelora_runtime.decode.stop_strings import StopFilter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora_runtime.bundle.manifest import ModelEntry
    from edgelora_runtime.bundle.router import Route
    from edgelora_runtime.decode.cancellation import Cancellation
    from edgelora_runtime.decode.grammar import Constraint
    from edgelora_runtime.decode.options import GenerateOptions


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    A request serves one generation, since stop, cancellation and constraint have a state. prompt: token ids. end_tokens: the
    model's own, unless the request ignores them, and those that a stop string is the text of. context: tokens that the model
    sees at once. A text that outgrows it loses its middle, so max_tokens is small enough in a request that must not lose it.
    route, logprobs: as in Generation and GenerateOptions. constraint: what the answer must fit. kept_tokens: special tokens
    whose text stays in the answer.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: StopFilter
    end_tokens: frozenset[int]
    context: int
    cancellation: Cancellation
    route: Route | None = None
    logprobs: int = 0
    constraint: Constraint | None = None
    kept_tokens: frozenset[int] = frozenset()


def build_request(
    options: GenerateOptions,
    prompt: Sequence[int],
    model: ModelEntry,
    *,
    cancellation: Cancellation,
    constraint: Constraint | None,
    route: Route | None,
    stop_tokens: frozenset[int] = frozenset(),
    kept_tokens: frozenset[int] = frozenset(),
) -> Request:
    """Builds a request from its options, which must be complete, and its prompt's tokens.

    stop_tokens: those that a stop string is the text of. They end the answer too, since decoding leaves their text out.
    """
    room = model.context_length - len(prompt) + 1  # the last token is never read back
    return Request(
        prompt=prompt,
        max_tokens=options["max_tokens"] if options["overflow"] == "slide" else min(options["max_tokens"], room),
        sampling=Sampling.of(options),
        stop=StopFilter(options["stop"]),
        end_tokens=stop_tokens if options["ignore_eos"] else stop_tokens.union(model.eos_token_ids),
        context=model.context_length,
        cancellation=cancellation,
        route=route,
        logprobs=options["logprobs"],
        constraint=constraint,
        kept_tokens=kept_tokens,
    )
