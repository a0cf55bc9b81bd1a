"""linear, ties and truncation against plain float64 references."""

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

from edgelora.methods.arithmetic import linear
from edgelora.methods.magnitude import trim
from edgelora.methods.spectra import truncate
from edgelora.methods.ties import ties
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
    """Entry by entry, in float64, as section 4 of arXiv 2306.01708 has it, on weighted deltas."""
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


@given(mixes())
def test_linear_is_the_weighted_sum(mix: tuple[list[Floats], list[float]]) -> None:
    deltas, weights = mix
    expected = sum(weight * delta.astype(np.float64) for delta, weight in zip(deltas, weights, strict=True))
    found = linear(deltas, weights)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


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


@given(hnp.arrays(np.float32, SHAPES, elements=VALUES))
def test_one_delta_at_weight_1_is_the_identity(delta: Floats) -> None:
    np.testing.assert_array_equal(linear([delta], [1.0]), delta)
    np.testing.assert_array_equal(ties([delta], [1.0], density=1.0), delta)


@given(hnp.arrays(np.float32, SHAPES, elements=VALUES), WEIGHTS)
def test_w_and_minus_w_cancel(delta: Floats, weight: float) -> None:
    assert not linear([delta, delta], [weight, -weight]).any()
    assert not ties([delta, delta], [weight, -weight], density=0.5).any()


@given(mixes(), st.randoms(use_true_random=False))
def test_order_does_not_matter(mix: tuple[list[Floats], list[float]], random: Any) -> None:
    deltas, weights = mix
    order = list(range(len(deltas)))
    random.shuffle(order)
    shuffled, reordered = [deltas[i] for i in order], [weights[i] for i in order]
    np.testing.assert_allclose(linear(shuffled, reordered), linear(deltas, weights), atol=1e-5)
    if not undecided(deltas, weights, 0.5):
        np.testing.assert_allclose(
            ties(shuffled, reordered, density=0.5), ties(deltas, weights, density=0.5), rtol=1e-5, atol=1e-6
        )


def peft_ties(deltas: Sequence[Floats], weights: Sequence[float], density: float) -> Any:
    from peft.utils.merge_utils import ties as run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of density 1
        return run([torch.from_numpy(delta) for delta in deltas], torch.tensor(list(weights)), density).numpy()


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_agrees_with_peft_for_equal_positive_weights(density: float) -> None:
    """There, electing the sign before or after weighting is the same. Shapes make density · size whole: PEFT rounds down."""
    random = np.random.default_rng(0)
    deltas = [random.normal(size=(20, 30)).astype(np.float32) for _ in range(3)]
    for weight in (1.0, 0.4):
        np.testing.assert_allclose(
            ties(deltas, [weight] * 3, density=density), peft_ties(deltas, [weight] * 3, density), rtol=1e-5, atol=1e-6
        )


def test_where_ties_differs_from_peft() -> None:
    """PEFT elects the sign on unweighted deltas, so that a delta of small weight can outvote a large one."""
    one, other = np.array([[1.0]], np.float32), np.array([[-3.0]], np.float32)
    assert ties([one, other], [1.0, 0.1], density=1.0) == pytest.approx(1.0)  # 1.0 against -0.3: positive
    assert peft_ties([one, other], [1.0, 0.1], 1.0) == pytest.approx(-0.3)  # 1.0 against -3.0: negative


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_impossible_densities_are_refused(density: float) -> None:
    with pytest.raises(InputError, match="density"):
        trim(np.ones((2, 2), np.float32), density)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(8, 5, 2), (5, 8, 5), (6, 6, 1), (3, 9, 7)])
def test_truncation_is_the_nearest_matrix_of_its_rank(rows: int, columns: int, rank: int) -> None:
    delta = np.random.default_rng(rows).normal(size=(rows, columns)).astype(np.float32)
    a, b, error = truncate(delta, rank)
    kept = min(rank, rows, columns)
    assert a.shape == (kept, columns)
    assert b.shape == (rows, kept)
    singular = torch.linalg.svdvals(torch.from_numpy(delta).double()).numpy()
    expected = np.sqrt(np.square(singular[kept:]).sum() / np.square(singular).sum())
    assert error == pytest.approx(expected, abs=1e-9)
    assert np.linalg.norm(delta - b @ a) / np.linalg.norm(delta) == pytest.approx(expected, abs=1e-6)


def test_truncating_nothing_gives_nothing() -> None:
    a, b, error = truncate(np.zeros((4, 3), np.float32), 2)
    assert error == 0
    assert not (b @ a).any()
