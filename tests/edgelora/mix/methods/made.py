"""Deltas and factors for tests: degenerate ones by hypothesis, and Gaussian ones in general position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgelora.mix.methods import MIX_METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

VALUES = st.floats(-8, 8, width=16)
WEIGHTS = st.floats(-2, 2).map(lambda weight: round(weight, 2))
NONZERO = WEIGHTS.filter(bool)


@dataclass(frozen=True)
class Made:
    """Several adapters' factors in one module, their weights, and their deltas in float64."""

    factors: Sequence[tuple[Floats, Floats]]
    weights: Sequence[float]

    @property
    def exact(self) -> list[Any]:
        return [b.astype(np.float64) @ a.astype(np.float64) for a, b in self.factors]

    @property
    def dense(self) -> list[Floats]:
        return [b @ a for a, b in self.factors]

    @property
    def size(self) -> float:
        """The scale for errors: the factors' size, because rows that cancel in a product keep the errors of its terms."""
        norms = [float(np.linalg.norm(a) * np.linalg.norm(b)) for a, b in self.factors]
        return sum(abs(w) * norm for w, norm in zip(self.weights, norms, strict=True)) or 1.0

    def reorder(self, order: Sequence[int]) -> Made:
        return Made([self.factors[i] for i in order], [self.weights[i] for i in order])


@st.composite
def any_factors(draw: st.DrawFn, weights: st.SearchStrategy[float] = WEIGHTS, most: int = 4) -> Made:
    """Small matrices with repeated, zero and cancelling entries."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))

    def matrix(*shape: int) -> Floats:
        values: Floats = draw(hnp.arrays(np.float32, shape, elements=VALUES))
        return values

    ranks = draw(st.lists(st.integers(1, 3), min_size=1, max_size=most))
    return Made([(matrix(r, columns), matrix(rows, r)) for r in ranks], [draw(weights) for _ in ranks])


@st.composite
def gaussian_factors(draw: st.DrawFn, weights: st.SearchStrategy[float] = NONZERO, fits: bool = False) -> Made:
    """Matrices in general position, without accidental ties. fits: the ranks sum to at most N and K."""
    ranks = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    least = sum(ranks) if fits else 1
    rows, columns = draw(st.integers(least, least + 20)), draw(st.integers(least, least + 20))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))

    def matrix(*shape: int) -> Floats:
        return random.normal(size=shape).astype(np.float32)

    return Made([(matrix(r, columns), matrix(rows, r)) for r in ranks], [draw(weights) for _ in ranks])


def apply(method: str, made: Made, *, density: float = 0.5, seeds: Sequence[int] | None = None) -> Any:
    """A method's ΔW (N, K), through its factors if it has them."""
    options = {"density": density, "seeds": seeds or list(range(len(made.weights)))}
    found = MIX_METHODS[method]
    arguments = {name: options[name] for name in found.reads}
    if found.factored is None:
        assert found.dense is not None
        return found.dense(made.dense, made.weights, **arguments)
    a, b = found.factored(made.factors, made.weights, **arguments)
    assert a.dtype == b.dtype == np.float32
    return b.astype(np.float64) @ a
