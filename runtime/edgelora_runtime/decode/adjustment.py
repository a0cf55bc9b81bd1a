"""Changes of the logits before a token is drawn: penalties, biases, and the caller's own functions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.arguments import show
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgelora_runtime.bundle.tokenizer import Tokenizer
    from edgelora_runtime.decode.options import GenerateOptions, LogitsProcessor

    Floats = NDArray[np.float32]

Biases = tuple[tuple[int, float], ...]  # (token id, what is added to its logit)


@dataclass(frozen=True)
class LogitChanges:
    """The options that change logits. See GenerateOptions. biases: the option logit_bias, by token id."""

    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    biases: Biases
    processors: tuple[LogitsProcessor, ...]

    @classmethod
    def of(cls, options: GenerateOptions, biases: Biases) -> LogitChanges:
        """Returns the changes of a request. options: complete, as resolve_options() returns them."""
        return cls(
            repetition_penalty=options["repetition_penalty"],
            presence_penalty=options["presence_penalty"],
            frequency_penalty=options["frequency_penalty"],
            biases=biases,
            processors=tuple(options["logits_processors"]),
        )


class Adjustment:
    """The changes of one answer's logits, which depend on the tokens before.

    They are made in this order: repetition penalty, presence and frequency penalty, biases, processors. prompt: token ids. The
    repetition penalty counts them as seen, the other penalties do not.
    """

    def __init__(self, changes: LogitChanges, prompt: Sequence[int]) -> None:
        self._changes = changes
        self._seen = set(prompt) if changes.repetition_penalty != 1 else None
        self._counts: Counter[int] | None = Counter() if changes.presence_penalty or changes.frequency_penalty else None
        self._text = list(prompt) if changes.processors else None
        self._biased = np.array([token for token, _ in changes.biases], np.int64)
        self._biases = np.array([bias for _, bias in changes.biases], np.float32)
        self._is_identity = self._seen is None and self._counts is None and self._text is None and not changes.biases

    def apply(self, logits: Floats) -> Floats:
        """Returns changed logits. Those that are given, float32 (V,), stay as they are."""
        if self._is_identity:
            return logits
        changed = logits.copy()
        if self._seen:
            penalize_repetition(changed, np.fromiter(self._seen, np.int64), self._changes.repetition_penalty)
        if self._counts:
            tokens = np.fromiter(self._counts.keys(), np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            penalize_counts(changed, tokens, counts, self._changes.presence_penalty, self._changes.frequency_penalty)
        changed[self._biased] += self._biases
        for at, processor in enumerate(self._changes.processors):
            assert self._text is not None
            changed = _check_processed(processor(list(self._text), changed), f"logits_processors[{at}]", len(logits))
        return changed

    def append(self, token: int) -> None:
        """Records a token that was drawn."""
        if self._seen is not None:
            self._seen.add(token)
        if self._counts is not None:
            self._counts[token] += 1
        if self._text is not None:
            self._text.append(token)


def penalize_repetition(logits: Floats, seen: NDArray[np.int64], penalty: float) -> None:
    """Divides the positive logits of seen tokens by a penalty, and multiplies the others by it (arXiv 1909.05858, section 4.1).

    Negative logits are multiplied, as transformers does, since dividing them would make the token likelier. Changes the logits.
    """
    values = logits[seen]
    logits[seen] = np.where(values > 0, values / penalty, values * penalty)


def penalize_counts(logits: Floats, tokens: NDArray[np.int64], counts: Floats, presence: float, frequency: float) -> None:
    """Subtracts `frequency` from a token's logit for each time that the answer has it, and `presence` once.

    tokens: those that the answer has, each once. counts: how often. OpenAI's API defines both penalties so:
    https://platform.openai.com/docs/guides/advanced-usage#frequency-and-presence-penalties
    Changes the logits.
    """
    logits[tokens] -= np.float32(frequency) * counts + np.float32(presence)


def find_biases(given: Mapping[int | str, float] | None, tokenizer: Tokenizer, vocab_size: int) -> Biases:
    """Returns the option logit_bias by token id.

    Raises UsageError for a text that is not one token, for a token outside the vocabulary, and for one that is named twice.
    """
    found: dict[int, float] = {}
    for name, bias in (given or {}).items():
        if isinstance(name, str):
            tokens = tokenizer.encode(name, special_tokens=False)
            if len(tokens) != 1:
                ids = ", ".join(map(str, tokens[:8]))
                raise UsageError(f"logit_bias: {show(name)} is {len(tokens)} tokens ({ids}), not one; give ids, each with a bias")
            token = tokens[0]
        else:
            token = int(name)
        if token >= vocab_size:
            raise UsageError(f"logit_bias: token {show(token)} is outside the vocabulary of {vocab_size}")
        if token in found:
            raise UsageError(f"logit_bias: {show(name)} is token {token}, which has a bias already; give each token once")
        found[token] = float(bias)
    return tuple(found.items())


def _check_processed(logits: Any, name: str, size: int) -> Floats:
    """Returns what a processor made, as float32 (V,). Raises UsageError if no token can be drawn from it."""
    if not isinstance(logits, np.ndarray) or logits.shape != (size,) or not np.issubdtype(logits.dtype, np.floating):
        shape = f"{logits.dtype} {logits.shape}" if isinstance(logits, np.ndarray) else type(logits).__name__
        raise UsageError(f"{name} returned {shape}; return the logits as float32 ({size},)")
    largest = logits.max()
    if not np.isfinite(largest):  # NaN is the maximum of an array that holds one
        raise UsageError(f"{name} returned logits whose largest is {largest}; leave at least one finite, and none NaN or +inf")
    return logits.astype(np.float32, copy=False)
