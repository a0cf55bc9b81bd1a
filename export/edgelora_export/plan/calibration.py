"""The token sequences that a variant is quantized on, and the disjoint ones that it is judged on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_BUFFERED = 1024  # rows of inputs between two updates of the sum: a thin update would cost its memory traffic, not its arithmetic


@dataclass(frozen=True)
class Sample:
    """One sequence. start: the first token whose prediction counts, 1 for plain text, the completion's first for a row."""

    tokens: tuple[int, ...]
    start: int = 1

    def __post_init__(self) -> None:
        assert 1 <= self.start < len(self.tokens)


@dataclass(frozen=True)
class Calibration:
    """What one variant is quantized on (fit) and judged on (held_out). sources: SHA-256 per file that they come from.

    spare: where nothing is held out to judge on, samples that GPTQ does not see; see unseen.
    """

    fit: tuple[Sample, ...] = ()
    held_out: tuple[Sample, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    spare: tuple[Sample, ...] = ()

    @property
    def unseen(self) -> tuple[Sample, ...]:
        """What decides, product by product, between GPTQ and rounding to nearest."""
        return self.held_out or self.spare

    @property
    def fit_tokens(self) -> int:
        return sum(len(sample.tokens) for sample in self.fit)


def take_share(samples: Sequence[Sample], parts: float) -> Sequence[Sample]:
    """The first samples that together have 1 / parts of all their tokens, at least one of them."""
    ends = np.cumsum([len(sample.tokens) for sample in samples])
    return samples[: 1 + int(np.searchsorted(ends, ends[-1] / parts))] if len(samples) else samples


class Moments:
    """Σ xᵀx, float32 (K, K), over inputs that come in pieces (T, K)."""

    def __init__(self, columns: int) -> None:
        self._sum = np.zeros((columns, columns), np.float32)
        self._pieces: list[Floats] = []
        self._rows = 0

    def add(self, inputs: Floats) -> None:
        self._pieces.append(inputs)
        self._rows += len(inputs)
        if self._rows >= _BUFFERED:
            self._flush()

    def total(self) -> Floats:
        self._flush()
        return self._sum

    def _flush(self) -> None:
        if self._pieces:
            rows = np.concatenate(self._pieces)
            self._sum += rows.T @ rows
            self._pieces, self._rows = [], 0
