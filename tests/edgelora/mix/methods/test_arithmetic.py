"""Sums, as a matrix and as factors, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from edgelora.mix.methods.arithmetic import least_rank_factors, linear, linear_factors
from edgelora.mix.methods.deltas import BLOCK_ENTRIES, Product
from tests.edgelora.mix.methods.made import Made, any_factors, apply, gaussian_factors


@given(any_factors())
def test_linear_is_the_weighted_sum_in_every_form(made: Made) -> None:
    expected = sum(weight * delta for weight, delta in zip(made.weights, made.exact, strict=True))
    found = linear(made.dense, made.weights)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6 * made.size)
    np.testing.assert_allclose(linear([Product(a, b) for a, b in made.factors], made.weights), expected, atol=1e-6 * made.size)
    a, b = linear_factors(made.factors, made.weights)
    assert len(a) == sum(len(a) for a, _ in made.factors)
    np.testing.assert_allclose(b @ a, expected, atol=1e-6 * made.size)
    np.testing.assert_allclose(apply("svd", made), expected, atol=2e-6 * made.size)


@given(gaussian_factors())
def test_svd_has_the_least_rank(made: Made) -> None:
    """Also for an adapter that is listed twice."""
    expected = np.linalg.matrix_rank(np.sum([w * d for w, d in zip(made.weights, made.exact, strict=True)], axis=0))
    assert len(least_rank_factors(made.factors, made.weights)[0]) == max(1, expected)
    doubled = Made([*made.factors, made.factors[0]], [*made.weights, 3.0])
    assert len(least_rank_factors(doubled.factors, doubled.weights)[0]) == max(1, expected)


@pytest.mark.parametrize("columns", [3, 1000, BLOCK_ENTRIES + 1])
def test_blocks_cover_every_row(columns: int) -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, columns)).astype(np.float32), random.normal(size=(211, 2)).astype(np.float32)
    np.testing.assert_allclose(linear([Product(a, b), b @ a], [1.0, -0.5]), 0.5 * (b @ a), atol=1e-5)
