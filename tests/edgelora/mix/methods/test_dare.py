"""DARE drops entries by its seeds only, keeps the expectation, and then sums or elects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from edgelora.mix.methods.dare import dare_linear, dare_ties, drop
from edgelora.mix.methods.deltas import Product
from edgelora.mix.methods.magnitude import magnitude
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


def gaussians(count: int, rows: int = 40, columns: int = 50) -> list[Floats]:
    random = np.random.default_rng(3)
    return [random.normal(size=(rows, columns)).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("columns", [1, 3, 50, 301])
def test_a_slice_of_rows_draws_what_the_whole_draws(columns: int) -> None:
    (delta,) = gaussians(1, 40, columns)
    whole = drop(delta, 0.3, 7)[:]
    for start, stop in ((0, 1), (5, 17), (39, 40), (12, 12)):
        np.testing.assert_array_equal(drop(delta, 0.3, 7)[start:stop], whole[start:stop])


def test_seeds_decide_and_nothing_else() -> None:
    one, other = gaussians(2)
    kept = drop(one, 0.5, 1)[:] != 0
    np.testing.assert_array_equal(drop(other, 0.5, 1)[:] != 0, kept)
    assert ((drop(one, 0.5, 2)[:] != 0) != kept).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("density", [0.01, 0.2, 0.9])
def test_the_share_and_the_expectation_are_kept(density: float) -> None:
    delta = np.ones((800, 500), np.float32)
    dropped = drop(delta, density, 11)[:]
    spread = np.sqrt(density * (1 - density) / delta.size)
    assert abs((dropped != 0).mean() - density) < 5 * spread
    assert abs(dropped.mean() - 1) < 5 * spread / density
    rows = (dropped != 0).mean(axis=1)
    assert rows.std() == pytest.approx(np.sqrt(density * (1 - density) / 500), rel=0.1), "rows are drawn apart"
    columns = (dropped != 0).mean(axis=0)
    assert columns.std() == pytest.approx(np.sqrt(density * (1 - density) / 800), rel=0.15)


def test_density_1_drops_nothing() -> None:
    (delta,) = gaussians(1)
    np.testing.assert_array_equal(drop(delta, 1.0, 0)[:], delta)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_impossible_densities_are_refused(density: float) -> None:
    with pytest.raises(InputError, match="density"):
        drop(np.ones((2, 2), np.float32), density, 0)


def test_products_are_dropped_as_arrays() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(3, 700)).astype(np.float32), random.normal(size=(400, 3)).astype(np.float32)
    found = dare_linear([Product(a, b)], [0.5], density=0.4, seeds=[9])
    np.testing.assert_allclose(found, dare_linear([b @ a], [0.5], density=0.4, seeds=[9]), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "weights"), [("dare_linear", [0.7, -0.4, 0.5]), ("dare_ties", [0.6, 0.6, 0.6]), ("magnitude", [0.7, -0.4, 0.5])]
)
def test_peft_agrees_under_the_same_mask(name: str, weights: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT 0.21 draws a mask over the whole tensor with torch's generator; the test gives it ours. Its dare_ties elects before
    weighting, which makes no difference for equal weights."""
    deltas, density, seeds = gaussians(3), 0.25, [4, 5, 6]
    ours: Any = {"dare_linear": dare_linear, "dare_ties": dare_ties, "magnitude": magnitude}[name]
    found = ours(deltas, weights, density=density, **({} if name == "magnitude" else {"seeds": seeds}))
    masks = iter([drop(np.ones_like(delta), density, seed)[:] for delta, seed in zip(deltas, seeds, strict=True)])

    def prune(tensor: Any, density: float, rescale: bool) -> Any:
        assert rescale
        return tensor * (torch.from_numpy(next(masks)) > 0) / density

    monkeypatch.setattr(merge_utils, "random_pruning", prune)
    theirs: Any = getattr(merge_utils, "magnitude_prune" if name == "magnitude" else name)
    expected = theirs([torch.from_numpy(delta) for delta in deltas], torch.tensor(weights), density).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
