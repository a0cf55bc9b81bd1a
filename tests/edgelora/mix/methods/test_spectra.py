"""Truncation loses the discarded singular values and reports the error: whole, from factors, and iterated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelora.mix.methods.krylov import find_largest, orthonormalize
from edgelora.mix.methods.spectra import truncate, truncate_product
from tests.edgelora.mix.methods.made import Made, any_factors


def least_error(delta: np.ndarray, rank: int) -> float:
    """Eckart-Young: the norm of the discarded singular values over the norm of all."""
    singular = torch.linalg.svdvals(torch.from_numpy(delta.astype(np.float64))).numpy()
    return float(np.sqrt(np.square(singular[rank:]).sum() / np.square(singular).sum()))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(8, 5, 2), (5, 8, 5), (6, 6, 1), (3, 9, 7), (90, 120, 30)])
def test_truncation_is_the_nearest_matrix_of_its_rank(rows: int, columns: int, rank: int) -> None:
    delta = np.random.default_rng(rows).normal(size=(rows, columns)).astype(np.float32)
    a, b, error = truncate(delta, rank)
    kept = min(rank, rows, columns)
    assert a.shape == (kept, columns)
    assert b.shape == (rows, kept)
    assert error == pytest.approx(least_error(delta, kept), abs=1e-9)
    assert np.linalg.norm(delta - b @ a) / np.linalg.norm(delta) == pytest.approx(error, abs=1e-6)


@given(any_factors(most=1), st.integers(1, 4))
def test_a_product_is_truncated_without_being_formed(made: Made, rank: int) -> None:
    (a, b), exact = made.factors[0], made.exact[0]
    left, right, error = truncate_product(a, b, rank)
    assert len(left) == right.shape[1] == min(rank, len(a), *exact.shape)
    if np.linalg.norm(exact) > 1e-6:
        assert error == pytest.approx(least_error(exact, rank), abs=1e-7)
        assert np.linalg.norm(exact - right @ left) / np.linalg.norm(exact) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(("decay", "rank"), [(0.0, 8), (0.5, 24), (1.0, 24), (2.0, 4)])
@pytest.mark.parametrize("shape", [(300, 200), (200, 400)])
def test_large_matrices_lose_little_more_than_they_must(shape: tuple[int, int], decay: float, rank: int) -> None:
    """At most 1/500 more, and 1/50 for a flat spectrum. The stated error is the factors' actual error."""
    random = np.random.default_rng(rank)
    u, v = (np.linalg.qr(random.normal(size=(side, min(shape))))[0] for side in shape)
    delta = ((u * np.arange(1, min(shape) + 1.0) ** -decay) @ v.T).astype(np.float32)
    a, b, error = truncate(delta, rank)
    assert a.shape == (rank, shape[1])
    least = least_error(delta, rank)
    assert least * (1 - 1e-5) <= error <= least * (1 + (2e-3 if decay else 2e-2))
    assert np.linalg.norm(delta.astype(np.float64) - b.astype(np.float64) @ a) / np.linalg.norm(delta) == pytest.approx(
        error, rel=1e-4
    )
    again, _, _ = truncate(delta, rank)
    np.testing.assert_array_equal(a, again)


def test_large_matrices_of_a_rank_are_held_by_it() -> None:
    random = np.random.default_rng(0)
    delta = (random.normal(size=(400, 12)) @ random.normal(size=(12, 300))).astype(np.float32)
    for rank in (12, 30):
        a, b, error = truncate(delta, rank)
        assert error < 1e-6
        np.testing.assert_allclose(b @ a, delta, atol=1e-4)


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_a_space_that_runs_out_of_directions_stays_orthonormal(shape: tuple[int, int]) -> None:
    """The second block finds fewer directions than it has columns; the filler columns must not count."""
    random = np.random.default_rng(1)
    delta = (random.normal(size=(shape[0], 40)) @ random.normal(size=(40, shape[1]))).astype(np.float32)
    u, s, vt = find_largest(delta, 12, float(np.square(delta, dtype=np.float64).sum()))
    np.testing.assert_allclose(u.T @ u, np.eye(12), atol=1e-5)
    np.testing.assert_allclose(vt @ vt.T, np.eye(12), atol=1e-5)
    np.testing.assert_allclose(s, np.linalg.svd(delta, compute_uv=False)[:12], rtol=1e-4)


@pytest.mark.parametrize("shape", [(4, 3), (200, 300)])
def test_truncating_nothing_gives_nothing(shape: tuple[int, int]) -> None:
    a, b, error = truncate(np.zeros(shape, np.float32), 2)
    assert error == 0
    assert not (b @ a).any()


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 60), st.floats(-14, 0), st.integers(0, 3))
@settings(deadline=None)
def test_tall_columns_become_orthonormal_however_dependent(seed: int, count: int, more: int, last: float, zeros: int) -> None:
    generator = np.random.default_rng(seed)
    columns = generator.standard_normal((count + more, count)) * np.logspace(0, last, count)
    columns = columns @ generator.standard_normal((count, count))
    columns[:, :zeros] = 0
    q, r = orthonormalize(columns)
    np.testing.assert_allclose(q.T @ q, np.eye(count), atol=1e-9)
    np.testing.assert_allclose(q @ r, columns, atol=1e-12 * max(1.0, np.abs(columns).max()))
    np.testing.assert_allclose(np.tril(r, -1), 0, atol=1e-12)
