"""tsv, iso_c, KnOTS and core space against float64 formulas on whole matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora.mix.methods.arithmetic import linear
from edgelora.mix.methods.core import in_core_space
from edgelora.mix.methods.knots import in_knots_space
from tests.edgelora.mix.methods.made import Made, any_factors, apply, gaussian_factors
from tests.edgelora.mix.methods.test_ties import reference_ties

DENSITIES = st.sampled_from([0.2, 0.5, 0.83, 1.0])


def reference_tsv(made: Made) -> Any:
    """TSV-Merge, arXiv 2412.00081, with weights on the singular values, for deltas whose ranks sum to at most N and K."""
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in made.exact]
    ranks = [len(a) for a, _ in made.factors]
    u = np.hstack([left[:, :r] for (left, _, _), r in zip(parts, ranks, strict=True)])
    v = np.vstack([right[:r] for (_, _, right), r in zip(parts, ranks, strict=True)])
    s = np.concatenate([w * values[:r] for (_, values, _), r, w in zip(parts, ranks, made.weights, strict=True)])
    (pu, _, qu), (pv, _, qv) = np.linalg.svd(u, full_matrices=False), np.linalg.svd(v, full_matrices=False)
    return pu @ qu @ np.diag(s) @ pv @ qv


def reference_iso(made: Made) -> Any:
    """Iso-C, arXiv 2502.04959, section 4, over the numerical rank."""
    total = np.sum([w * delta for w, delta in zip(made.weights, made.exact, strict=True)], axis=0)
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    rank = np.linalg.matrix_rank(total)
    return s[:rank].mean() * u[:, :rank] @ vt[:rank]


def reference_core(made: Made, merge: Any) -> Any:
    """arXiv 2509.17786, with SVDs of the stacked factors."""
    u = np.linalg.svd(np.hstack([b.astype(np.float64) for _, b in made.factors]), full_matrices=False)[0]
    vt = np.linalg.svd(np.vstack([a.astype(np.float64) for a, _ in made.factors]), full_matrices=False)[2]
    return u @ merge([u.T @ delta @ vt.T for delta in made.exact]) @ vt


def reference_knots(made: Made, merge: Any) -> Any:
    """arXiv 2410.19735, with the SVD of the concatenated deltas."""
    u, s, vt = np.linalg.svd(np.hstack(made.exact), full_matrices=False)
    rank = np.linalg.matrix_rank(np.hstack(made.exact))
    parts = np.split(vt[:rank], len(made.weights), axis=1)
    return u[:, :rank] @ merge([np.diag(s[:rank]) @ part for part in parts])


@given(gaussian_factors(fits=True))
def test_tsv_is_the_paper_in_both_spaces(made: Made) -> None:
    expected = reference_tsv(made)
    np.testing.assert_allclose(apply("tsv", made), expected, atol=1e-4 * made.size)
    np.testing.assert_allclose(apply("core_tsv", made), expected, atol=1e-4 * made.size)


@given(gaussian_factors())
def test_tsv_is_the_same_in_both_spaces_where_ranks_do_not_fit(made: Made) -> None:
    np.testing.assert_allclose(apply("core_tsv", made), apply("tsv", made), atol=1e-4 * made.size)


@given(gaussian_factors())
def test_iso_is_the_paper_in_both_spaces(made: Made) -> None:
    expected = reference_iso(made)
    np.testing.assert_allclose(apply("iso_c", made), expected, atol=1e-4 * made.size)
    np.testing.assert_allclose(apply("core_iso", made), expected, atol=1e-4 * made.size)


@given(any_factors())
def test_sums_are_the_same_in_every_space(made: Made) -> None:
    expected = np.sum([w * delta for w, delta in zip(made.weights, made.exact, strict=True)], axis=0)
    alike = Made(made.factors, [max(map(abs, made.weights))] * len(made.weights))  # rounding is removed before weights apply
    for space in (in_core_space, in_knots_space):
        a, b = space(linear)(made.factors, made.weights)
        np.testing.assert_allclose(b.astype(np.float64) @ a, expected, atol=2e-6 * alike.size)


@given(gaussian_factors(), DENSITIES)
def test_core_ties_is_ties_on_the_cores(made: Made, density: float) -> None:
    """This differs from ties on the deltas, which does not commute with a change of basis."""
    expected = reference_core(made, lambda cores: reference_ties(cores, made.weights, density))
    np.testing.assert_allclose(apply("core_ties", made, density=density), expected, atol=1e-5 * made.size)


@given(gaussian_factors(), DENSITIES)
def test_knots_is_ties_on_the_parts_of_the_wide_decomposition(made: Made, density: float) -> None:
    expected = reference_knots(made, lambda parts: reference_ties(parts, made.weights, density))
    np.testing.assert_allclose(apply("knots", made, density=density), expected, atol=1e-5 * made.size)


@given(gaussian_factors(), st.sampled_from([0.2, 0.5, 0.83]))
def test_knots_counts_no_directions_that_are_rounding(made: Made, density: float) -> None:
    """An adapter listed twice adds no directions, so the density applies to the existing ones."""
    twice = Made([*made.factors, made.factors[0]], [*made.weights, 0.375])  # no drawn weights cancel it
    expected = reference_knots(twice, lambda parts: reference_ties(parts, twice.weights, density))
    np.testing.assert_allclose(apply("knots", twice, density=density), expected, atol=1e-5 * twice.size)


@pytest.mark.parametrize("space", [in_core_space, in_knots_space])
def test_no_matrix_of_the_modules_size_is_formed(space: Any) -> None:
    """A whole matrix would take 400 GB."""
    a, b = np.ones((2, 300_000), np.float32), np.ones((350_000, 2), np.float32)
    found, other = space(linear)([(a, b), (a, b)], [0.5, 0.25])
    assert other[7] @ found[:, 5] == pytest.approx(1.5)
