"""The token sequences on which a variant is quantized, and the disjoint ones on which it is judged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_BUFFER_ROWS = 1024  # of inputs between two updates of the sum. Smaller updates are bound by memory traffic


@dataclass(frozen=True)
class Sample:
    """One sequence of tokens.

    start: the first token whose prediction counts: 1 for plain text, the first token of the completion for a row of training
    data.
    """

    tokens: tuple[int, ...]
    start: int = 1

    def __post_init__(self) -> None:
        assert 1 <= self.start < len(self.tokens)


@dataclass(frozen=True)
class Calibration:
    """The samples on which one variant is quantized (fit) and judged (held_out).

    sources: SHA-256 of each file that they come from. spare: samples that GPTQ does not see, for when nothing is held out. See
    unseen.
    """

    fit: tuple[Sample, ...] = ()
    held_out: tuple[Sample, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    spare: tuple[Sample, ...] = ()

    @property
    def unseen(self) -> tuple[Sample, ...]:
        """The samples that decide, product by product, between GPTQ and rounding to nearest."""
        return self.held_out or self.spare

    @property
    def fit_tokens(self) -> int:
        """The number of tokens in the samples of `fit`."""
        return sum(len(sample.tokens) for sample in self.fit)


def take_share(samples: Sequence[Sample], parts: float) -> Sequence[Sample]:
    """Takes the first samples that together have 1 / parts of all tokens, at least one sample.

    >>> samples = [Sample((1, 2, 3)), Sample((4, 5)), Sample((6, 7, 8))]
    >>> [len(sample.tokens) for sample in take_share(samples, 2)]
    [3, 2]
    """
    ends = np.cumsum([len(sample.tokens) for sample in samples])
    return samples[: 1 + int(np.searchsorted(ends, ends[-1] / parts))] if len(samples) else samples


class Moments:
    """Σ xᵀx, float32 (K, K), over inputs that arrive in pieces (T, K)."""

    def __init__(self, columns: int) -> None:
        self._sum = np.zeros((columns, columns), np.float32)
        self._pieces: list[Floats] = []
        self._rows = 0

    def add(self, inputs: Floats) -> None:
        """Adds a piece of inputs (T, K)."""
        self._pieces.append(inputs)
        self._rows += len(inputs)
        if self._rows >= _BUFFER_ROWS:
            self._flush()

    def total(self) -> Floats:
        """Returns the sum over all pieces so far."""
        self._flush()
        return self._sum

    def _flush(self) -> None:
        if self._pieces:
            rows = np.concatenate(self._pieces)
            self._sum += rows.T @ rows
            self._pieces, self._rows = [], 0
