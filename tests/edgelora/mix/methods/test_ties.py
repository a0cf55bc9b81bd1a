"""Trimming and sign election against plain float64 references."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgelora.mix.methods.magnitude import find_threshold, trim
from edgelora.mix.methods.ties import ties, ties_weighted
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=6)
VALUES = st.floats(-8, 8, width=16)
WEIGHTS = st.floats(-2, 2).map(lambda weight: round(weight, 2))


@st.composite
def mixes(draw: st.DrawFn) -> tuple[list[Floats], list[float]]:
    shape, count = draw(SHAPES), draw(st.integers(1, 4))
    deltas = [draw(hnp.arrays(np.float32, shape, elements=VALUES)) for _ in range(count)]
    return deltas, [draw(WEIGHTS) for _ in range(count)]


def reference_trim(delta: Any, density: float) -> Any:
    """Entries at least as large as the ceil(density · size)-th largest."""
    magnitudes = sorted((abs(float(value)) for value in delta.flat), reverse=True)
    threshold = magnitudes[math.ceil(density * delta.size) - 1]
    return np.where(np.abs(delta.astype(np.float64)) >= threshold, delta.astype(np.float64), 0.0)


def reference_ties(deltas: Sequence[Any], weights: Sequence[float], density: float) -> Any:
    """TIES entry by entry in float64, as in section 4 of arXiv 2306.01708, on weighted deltas."""
    parts = [weight * reference_trim(delta, density) for delta, weight in zip(deltas, weights, strict=True)]
    merged = np.zeros(parts[0].shape)
    for index in np.ndindex(merged.shape):
        values = [part[index] for part in parts]
        sign = np.sign(sum(values))
        agreeing = [value for value in values if value != 0 and np.sign(value) == sign]
        merged[index] = sum(agreeing) / max(len(agreeing), 1)
    return merged


def undecided(deltas: Sequence[Any], weights: Sequence[float], density: float) -> bool:
    """Whether float32 and float64 may elect different signs somewhere."""
    parts = [weight * reference_trim(delta, density) for delta, weight in zip(deltas, weights, strict=True)]
    total, size = np.sum(parts, axis=0), np.sum(np.abs(parts), axis=0)
    return bool(((np.abs(total) < 1e-5 * size) & (size > 0)).any())


@given(mixes(), st.floats(0.01, 1.0))
@settings(deadline=None)
def test_ties_is_the_paper(mix: tuple[list[Floats], list[float]], density: float) -> None:
    deltas, weights = mix
    found = ties(deltas, weights, density=density)
    assert found.dtype == np.float32
    if not undecided(deltas, weights, density):
        np.testing.assert_allclose(found, reference_ties(deltas, weights, density), rtol=1e-5, atol=1e-6)


@given(hnp.arrays(np.float32, SHAPES, elements=VALUES), st.floats(0.01, 1.0))
def test_trim_keeps_the_largest(delta: Floats, density: float) -> None:
    kept = trim(delta, density)[:]
    np.testing.assert_array_equal(kept, reference_trim(delta, density))
    assert np.count_nonzero(kept) <= np.count_nonzero(delta)


def test_entries_that_are_equal_but_for_rounding_are_kept_together() -> None:
    """This way, trimming does not depend on how ΔW was computed, or in which basis."""
    delta = np.array([[3, 1, np.nextafter(np.float32(1), np.float32(0)), 0.99]], np.float32)
    np.testing.assert_array_equal(trim(delta, 0.5)[:] != 0, [[True, True, True, False]])


def reference_ties_weighted(deltas: Sequence[Any], weights: Sequence[float], density: float) -> Any:
    """The same with the sum of absolute weights, mergekit's divisor for positive weights, instead of the count."""
    parts = [weight * reference_trim(delta, density) for delta, weight in zip(deltas, weights, strict=True)]
    merged = np.zeros(parts[0].shape)
    for index in np.ndindex(merged.shape):
        values = [part[index] for part in parts]
        sign = np.sign(sum(values))
        agreeing = [(value, abs(w)) for value, w in zip(values, weights, strict=True) if value != 0 and np.sign(value) == sign]
        if agreeing:
            merged[index] = sum(value for value, _ in agreeing) / sum(share for _, share in agreeing)
    return merged


@given(mixes(), st.floats(0.01, 1.0))
def test_ties_weighted_divides_by_weights(mix: tuple[list[Floats], list[float]], density: float) -> None:
    deltas, weights = mix
    if not undecided(deltas, weights, density):
        found = ties_weighted(deltas, weights, density=density)
        np.testing.assert_allclose(found, reference_ties_weighted(deltas, weights, density), rtol=1e-5, atol=1e-6)


def test_a_negative_weight_flips_votes() -> None:
    """-w times Δ equals w times -Δ, in the election and in the mean."""
    random = np.random.default_rng(0)
    one, other = (random.normal(size=(20, 30)).astype(np.float32) for _ in range(2))
    for method in (ties, ties_weighted):
        np.testing.assert_array_equal(
            method([one, other], [0.6, -0.5], density=0.4), method([one, -other], [0.6, 0.5], density=0.4)
        )


def test_a_vote_that_rounding_decides_elects_nothing() -> None:
    """Three deltas that cancel exactly, but whose float32 sum is not 0."""
    deltas = [np.full((1, 1), value, np.float32) for value in (0.3, 0.4, -0.7)]
    assert sum(delta[0, 0] for delta in deltas) != 0
    assert ties(deltas, [1.0, 1.0, 1.0], density=1.0) == 0
    assert ties(deltas, [1.0, 1.0, 0.99], density=1.0) == pytest.approx(0.35)


def test_more_adapters_than_a_byte_counts() -> None:
    deltas = [np.ones((1, 1), np.float32)] * 300
    assert ties(deltas, [1.0] * 300, density=1.0) == 1


LARGE: dict[str, Any] = {
    "gaussian": lambda random: random.normal(size=(700, 300)),
    "rows of other sizes": lambda random: random.normal(size=(700, 300)) * np.exp(3 * random.normal(size=(700, 1))),
    "the sampled rows are small": lambda random: random.normal(size=(700, 300)) * (np.arange(700) % 5 > 0)[:, None],
    "few values": lambda random: random.integers(-3, 4, (700, 300)),
    "mostly zero": lambda random: random.normal(size=(700, 300)) * (random.random((700, 300)) < 0.01),
    "all equal": lambda random: np.full((700, 300), 0.25),
    "one row": lambda random: random.normal(size=(1, 210_000)),
    "one column": lambda random: random.normal(size=(210_000, 1)),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE.keys())
@pytest.mark.parametrize("density", [1e-5, 0.004, 0.2, 0.77, 1.0])
def test_the_threshold_of_a_large_matrix_is_exact(make: Any, density: float) -> None:
    """Even if the sample of rows is misleading."""
    delta = make(np.random.default_rng(0)).astype(np.float32)
    expected = np.sort(np.abs(delta), axis=None)[::-1][math.ceil(density * delta.size) - 1]
    assert find_threshold(delta, density) == expected
    np.testing.assert_array_equal(trim(delta, density)[5:90], np.where(np.abs(delta) >= expected, delta, 0)[5:90])


def peft_ties(deltas: Sequence[Floats], weights: Sequence[float], density: float) -> Any:
    from peft.utils.merge_utils import ties as run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about density 1
        return run([torch.from_numpy(delta) for delta in deltas], torch.tensor(list(weights)), density).numpy()


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_agrees_with_peft_for_equal_positive_weights(density: float) -> None:
    """For those, electing before or after weighting is the same. density · size is a whole number here, as PEFT rounds down."""
    random = np.random.default_rng(0)
    deltas = [random.normal(size=(20, 30)).astype(np.float32) for _ in range(3)]
    for weight in (1.0, 0.4):
        np.testing.assert_allclose(
            ties(deltas, [weight] * 3, density=density), peft_ties(deltas, [weight] * 3, density), rtol=1e-5, atol=1e-6
        )


def test_where_ties_differs_from_peft() -> None:
    """PEFT elects signs on unweighted deltas, so a delta with a small weight can outvote one with a large weight."""
    one, other = np.array([[1.0]], np.float32), np.array([[-3.0]], np.float32)
    assert ties([one, other], [1.0, 0.1], density=1.0) == pytest.approx(1.0)  # 1.0 against -0.3: positive
    assert peft_ties([one, other], [1.0, 0.1], 1.0) == pytest.approx(-0.3)  # 1.0 against -3.0: negative


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_impossible_densities_are_refused(density: float) -> None:
    with pytest.raises(InputError, match="density"):
        trim(np.ones((2, 2), np.float32), density)
