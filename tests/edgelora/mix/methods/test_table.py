"""Properties of every method: one adapter is unchanged, w and -w cancel, order does not matter; and the known exceptions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelora.mix.methods import MIX_METHODS, Method
from tests.edgelora.mix.methods.made import NONZERO, Made, any_factors, apply, gaussian_factors

FLAT = {"core_iso", "iso_c"}  # they flatten the spectrum even of one adapter
RANDOM = {"dare_linear", "dare_ties"}
RATIO = {"ties_weighted"}  # ignores the scale of the weights


def test_every_method_says_what_it_is() -> None:
    for name, method in MIX_METHODS.items():
        assert method.dense or method.factored, name
        assert 10 < len(method.summary) < 80, name
        assert set(method.settings) <= {"density", "seed"}, name
    assert Method("x", reads=("density", "seeds")).settings == ("density", "seed")


@pytest.mark.parametrize("method", sorted(MIX_METHODS.keys() - FLAT))
@given(made=any_factors(weights=st.just(1.0), most=1))
def test_one_adapter_at_weight_1_is_itself(method: str, made: Made) -> None:
    np.testing.assert_allclose(apply(method, made, density=1.0), made.exact[0], atol=2e-6 * made.size)


@pytest.mark.parametrize("method", sorted(FLAT))
@given(made=gaussian_factors(weights=st.just(1.0)))
def test_a_flat_spectrum_keeps_directions_and_their_mean(method: str, made: Made) -> None:
    found = np.linalg.svd(apply(method, made), compute_uv=False)
    singular = np.linalg.svd(np.sum(made.exact, axis=0), compute_uv=False)
    rank = int((singular > 1e-9 * singular[0]).sum())
    np.testing.assert_allclose(found[:rank], singular[:rank].mean(), rtol=1e-4)
    np.testing.assert_allclose(found[rank:], 0, atol=1e-5 * singular[0])


@pytest.mark.parametrize("method", sorted(MIX_METHODS.keys() - RANDOM))
@given(made=any_factors(most=1), weight=NONZERO)
def test_w_and_minus_w_cancel(method: str, made: Made, weight: float) -> None:
    twice = Made([made.factors[0]] * 2, [weight, -weight])
    np.testing.assert_allclose(apply(method, twice), 0, atol=2e-6 * twice.size)


@pytest.mark.parametrize("method", sorted(RANDOM))
def test_dropped_deltas_cancel_only_where_they_are_dropped_alike(method: str) -> None:
    random = np.random.default_rng(0)
    pair = (random.normal(size=(2, 9)).astype(np.float32), random.normal(size=(7, 2)).astype(np.float32))
    twice = Made([pair] * 2, [0.7, -0.7])
    assert not apply(method, twice, seeds=[5, 5]).any()
    assert apply(method, twice, seeds=[5, 6]).any()


@pytest.mark.parametrize("method", sorted(MIX_METHODS))
@given(made=gaussian_factors(), random=st.randoms(use_true_random=False))
def test_order_does_not_matter(method: str, made: Made, random: Any) -> None:
    order = list(range(len(made.weights)))
    random.shuffle(order)
    found = apply(method, made.reorder(order), seeds=order)
    np.testing.assert_allclose(found, apply(method, made), atol=1e-5 * made.size)


@pytest.mark.parametrize("method", sorted(MIX_METHODS))
@given(made=gaussian_factors(), scale=st.floats(-3, 3).filter(lambda scale: abs(scale) > 0.01))
@settings(max_examples=30)
def test_weights_scale_the_result(method: str, made: Made, scale: float) -> None:
    """Scaling all weights by c scales the result by c, or only by its sign where just the ratio of the weights counts."""
    scaled = Made(made.factors, [scale * weight for weight in made.weights])
    expected = apply(method, made) * (np.sign(scale) if method in RATIO else scale)
    np.testing.assert_allclose(apply(method, scaled), expected, atol=1e-5 * max(made.size, scaled.size))


@pytest.mark.parametrize("method", sorted(MIX_METHODS))
def test_nothing_makes_nothing(method: str) -> None:
    zeros = Made([(np.zeros((2, 5), np.float32), np.zeros((4, 2), np.float32))] * 2, [1.0, 0.5])
    assert not apply(method, zeros).any()
