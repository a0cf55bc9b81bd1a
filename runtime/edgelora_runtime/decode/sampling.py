"""Choosing the next token from logits: greedy, or a draw from what temperature, top-k, top-p and min-p leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelora_runtime.errors import UsageError, list_wrong

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


_FIRST_SLICE, _GROWTH = 64, 8  # tokens that are sorted at first, and by how much more where these do not do


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature: 0 is greedy. top_k: keep the k likeliest, 0 for all. top_p: keep the fewest that together reach this
    probability (arXiv 1904.09751). min_p: keep those at least this likely relative to the likeliest (arXiv 2407.01082).
    repetition_penalty: logits of tokens already seen are divided by it if positive, else multiplied (arXiv 1909.05858).
    seed: None draws differently each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        wrong = list_wrong(
            (
                ("temperature", self.temperature, 0 <= self.temperature < np.inf, "0 (greedy) or more"),
                ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
                ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1"),
                ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
                ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < np.inf, "more than 0; 1 is none"),
                ("seed", self.seed, self.seed is None or self.seed >= 0, "a whole number, 0 or more"),
            )
        )
        if wrong:
            raise UsageError("; ".join(wrong))


class Sampler:
    """Draws tokens one after another, with one random stream and the tokens seen so far."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else None

    def draw(self, logits: Floats) -> int:
        """The next token for logits of shape (V,), which stay untouched."""
        settings = self._sampling
        if self._seen:
            logits = _penalize(logits, np.fromiter(self._seen, np.int64), settings.repetition_penalty)
        if settings.temperature == 0 or settings.top_k == 1:
            token = int(logits.argmax())
        else:
            tokens, probabilities = keep_likely(logits, settings)
            token = int(self._random.choice(tokens, p=probabilities))
        if self._seen is not None:
            self._seen.add(token)
        return token


def _penalize(logits: Floats, seen: NDArray[np.int64], penalty: float) -> Floats:
    changed = logits.copy()
    values = logits[seen]
    changed[seen] = np.where(values > 0, values / penalty, values * penalty)
    return changed


def take_largest(logits: Floats, count: int) -> NDArray[np.int64]:
    """The tokens of so many largest logits, largest first, of equal ones that of the lowest number first."""
    last = logits.size - count
    tokens = np.sort(np.argpartition(logits, last)[last:]) if last > 0 else np.arange(logits.size)
    return tokens[np.argsort(-logits[tokens], kind="stable")]


def _weigh(logits: Floats, largest: np.float32, temperature: float) -> NDArray[np.float64]:
    """Probabilities relative to the likeliest token's."""
    weights: NDArray[np.float64] = np.exp((logits.astype(np.float64) - largest) / temperature)
    return weights


def _take_likely(logits: Floats, settings: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The likeliest tokens, as many as top-p and min-p may keep or more, and their probabilities among all.

    Only a slice is sorted, which grows until it has what is needed: the vocabulary's long end is mostly filtered out.
    """
    weights = _weigh(logits, logits.max(), settings.temperature)
    total = weights.sum()
    count = _FIRST_SLICE
    while count < logits.size:
        tokens = take_largest(logits, count)
        taken = weights[tokens]
        # A hair more than is asked for, since sums in another order differ in their last bits.
        if taken.sum() > settings.top_p * total * (1 + 1e-9) or taken[-1] < settings.min_p:
            return tokens, taken / total
        count *= _GROWTH
    tokens = take_largest(logits, logits.size)
    return tokens, weights[tokens] / total


def keep_likely(logits: Floats, settings: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn, likeliest first, and their probabilities (float64, sum 1).

    Filters apply in the order top-k, top-p, min-p, each on the distribution after temperature; the likeliest always stays.
    Without any, all tokens by number.
    """
    if 0 < settings.top_k < logits.size:
        tokens = take_largest(logits, settings.top_k)
        probabilities = _weigh(logits[tokens], logits[tokens[0]], settings.temperature)
        probabilities /= probabilities.sum()
    elif settings.top_p >= 1 and settings.min_p <= 0:
        weights = _weigh(logits, logits.max(), settings.temperature)
        return np.arange(logits.size), weights / weights.sum()
    else:
        tokens, probabilities = _take_likely(logits, settings)
    reached_before = np.cumsum(probabilities) - probabilities
    kept = (reached_before < settings.top_p) & (probabilities >= settings.min_p * probabilities[0])
    kept[0] = True
    tokens, probabilities = tokens[kept], probabilities[kept]
    return tokens, probabilities / probabilities.sum()
