"""The choice of the next token: the likeliest, or a draw after temperature, top-k, top-p and min-p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelora_runtime.decode.adjustment import Adjustment, LogitChanges

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgelora_runtime.decode.adjustment import Biases
    from edgelora_runtime.decode.options import GenerateOptions

    Floats = NDArray[np.float32]
    TakeLargest = Callable[[Floats, int], NDArray[np.int64]]


_FIRST_SLICE, _GROWTH = 64, 8  # tokens that are sorted first, and the factor by which the slice grows if it is too small


@dataclass(frozen=True)
class Sampling:
    """The options that say how a request's tokens are drawn. See GenerateOptions."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    changes: LogitChanges

    @classmethod
    def of(cls, options: GenerateOptions, biases: Biases = (), index: int = 0) -> Sampling:
        """Returns the sampling of an answer.

        options: complete, as resolve_options() returns them. biases: the option logit_bias, by token id. index: the number of the
        answer among several of one request. Each has a seed of its own.
        """
        return cls(
            temperature=options["temperature"],
            top_k=options["top_k"],
            top_p=options["top_p"],
            min_p=options["min_p"],
            seed=None if options["seed"] is None else options["seed"] + index,
            changes=LogitChanges.of(options, biases),
        )


class Sampler:
    """A sampler that draws tokens one after another.

    prompt: token ids, which count as seen for the repetition penalty.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._adjustment = Adjustment(sampling.changes, prompt)

    def draw(self, logits: Floats, mask: Callable[[Floats], Floats] | None = None) -> int:
        """Draws the next token from logits of shape (V,), which are not modified.

        mask: what a constraint does to the logits, after all other changes.
        """
        settings = self._sampling
        logits = self._adjustment.apply(logits)
        if mask is not None:
            logits = mask(logits)
        if settings.temperature == 0 or settings.top_k == 1:
            token = int(logits.argmax())
        else:
            tokens, probabilities = keep_likely(logits, settings)
            token = int(self._random.choice(tokens, p=probabilities))
        self._adjustment.append(token)
        return token


def take_largest(logits: Floats, count: int) -> NDArray[np.int64]:
    """Returns the tokens of the `count` largest logits, largest first.

    Of equal ones, the lowest token id comes first.
    """
    last = logits.size - count
    tokens = np.sort(np.argpartition(logits, last)[last:]) if last > 0 else np.arange(logits.size)
    return tokens[np.argsort(-logits[tokens], kind="stable")]


def _weigh(logits: Floats, largest: np.float32, temperature: float) -> NDArray[np.float64]:
    """Returns probabilities relative to that of the likeliest token."""
    with np.errstate(over="ignore"):  # of a tiny temperature: the weight is 0
        weights: NDArray[np.float64] = np.exp((logits.astype(np.float64) - largest) / temperature)
    return weights


def _take_likely(logits: Floats, settings: Sampling, take_largest: TakeLargest) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the likeliest tokens and their probabilities among all tokens.

    They are at least as many as top-p and min-p can keep. Only a slice is sorted, which grows until it is large enough: the
    filters drop most of the vocabulary's long tail.
    """
    weights = _weigh(logits, logits.max(), settings.temperature)
    total = weights.sum()
    count = _FIRST_SLICE
    while count < logits.size:
        tokens = take_largest(logits, count)
        taken = weights[tokens]
        # The margin allows for sums in another order, which differ in their last bits.
        if taken.sum() > settings.top_p * total * (1 + 1e-9) or taken[-1] < settings.min_p:
            return tokens, taken / total
        count *= _GROWTH
    tokens = take_largest(logits, logits.size)
    return tokens, weights[tokens] / total


def keep_likely(
    logits: Floats, settings: Sampling, take_largest: TakeLargest = take_largest
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the tokens that can be drawn, likeliest first, and their probabilities.

    Probabilities are float64 and sum to 1. Filters apply in the order top-k, top-p, min-p, each to the distribution after
    temperature. The likeliest token always stays. Without filters, nothing is sorted: all tokens by id. take_largest: the
    function that sorts.
    """
    if 0 < settings.top_k < logits.size:
        tokens = take_largest(logits, settings.top_k)
        probabilities = _weigh(logits[tokens], logits[tokens[0]], settings.temperature)
        probabilities /= probabilities.sum()
    elif settings.top_p >= 1 and settings.min_p <= 0:
        weights = _weigh(logits, logits.max(), settings.temperature)
        return np.arange(logits.size), weights / weights.sum()
    else:
        tokens, probabilities = _take_likely(logits, settings, take_largest)
    reached_before = np.cumsum(probabilities) - probabilities
    kept = (reached_before < settings.top_p) & (probabilities >= settings.min_p * probabilities[0])
    kept[0] = True
    tokens, probabilities = tokens[kept], probabilities[kept]
    return tokens, probabilities / probabilities.sum()
