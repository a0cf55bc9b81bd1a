"""Interference figures from factors, compared with dense float64 formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgelora.report import interference
from edgelora.report.interference import NEGLIGIBLE, Stack, compare_deltas, summarize
from edgelora.report.output_interference import choose_weights, likely_moments, output_products, relate_outputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]
    Factors = tuple[Any, Any]

VALUES = st.floats(-4, 4, width=16).map(lambda value: value if abs(value) > 0.01 else 0.0)


@st.composite
def pairs(draw: st.DrawFn) -> list[Factors]:
    """A (r, K) and B (N, r) of two or three deltas of one module, of different ranks."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    ranks = draw(st.lists(st.integers(1, 4), min_size=2, max_size=3))
    return [
        (draw(hnp.arrays(np.float32, (r, columns), elements=VALUES)), draw(hnp.arrays(np.float32, (rows, r), elements=VALUES)))
        for r in ranks
    ]


def random_factors(seed: int, rank: int = 4, rows: int = 40, columns: int = 30) -> Factors:
    random = np.random.default_rng(seed)
    return random.normal(size=(rank, columns)).astype(np.float32), random.normal(size=(rows, rank)).astype(np.float32)


def dense(pair: Factors) -> Doubles:
    return np.asarray(pair[1].astype(np.float64) @ pair[0].astype(np.float64))


def reference_overlap(one: Doubles, other: Doubles) -> float:
    """tr(P·Q) / the smaller rank, P and Q being projectors onto the row spaces, from pseudoinverses."""
    ranks = [np.linalg.matrix_rank(delta, tol=1e-6 * np.linalg.norm(delta)) if delta.any() else 0 for delta in (one, other)]
    if not min(ranks):
        return 0.0
    projectors = [np.linalg.pinv(delta, rcond=1e-6) @ delta for delta in (one, other)]
    return float(np.trace(projectors[0] @ projectors[1]) / min(ranks))


def well_conditioned(delta: Doubles) -> bool:
    """Whether the rank of a delta is beyond doubt."""
    s = np.linalg.svd(delta, compute_uv=False)
    return not ((s > 1e-9 * s[0]) & (s < 1e-3 * s[0])).any()


@settings(max_examples=40)
@given(pairs())
def test_inner_products_norms_and_cosines(factors: list[Factors]) -> None:
    figures = compare_deltas(Stack.of(factors))
    deltas = [dense(pair) for pair in factors]
    expected = [[float((one * other).sum()) for other in deltas] for one in deltas]
    np.testing.assert_allclose(figures.inner, expected, rtol=1e-9, atol=1e-9)
    found = summarize([figures], 0, 1)
    norms = [float(np.linalg.norm(delta)) for delta in deltas[:2]]
    assert found.norms == pytest.approx(norms, rel=1e-6, abs=1e-6)
    if min(norms) > 1e-3:
        assert found.cosine == pytest.approx(expected[0][1] / (norms[0] * norms[1]), abs=1e-9)


@settings(max_examples=40)
@given(pairs())
def test_overlaps_of_what_is_read_and_written(factors: list[Factors]) -> None:
    deltas = [dense(pair) for pair in factors]
    if all(map(well_conditioned, deltas)):
        found = summarize([compare_deltas(Stack.of(factors))], 0, 1)
        assert found.row_overlap == pytest.approx(reference_overlap(deltas[0], deltas[1]), abs=1e-6)
        assert found.column_overlap == pytest.approx(reference_overlap(deltas[0].T, deltas[1].T), abs=1e-6)


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_sign_conflicts_entry_by_entry(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the blocks makes no difference."""
    monkeypatch.setattr(interference, "_BLOCK", block)
    factors = [random_factors(1), random_factors(2, rank=2)]
    one, other = map(dense, factors)
    loud = opposed = 0
    mass = lost = 0.0
    floors = [NEGLIGIBLE * np.sqrt((delta**2).mean()) for delta in (one, other)]
    for x, y in zip(one.flat, other.flat, strict=True):
        if abs(x) > floors[0] and abs(y) > floors[1]:
            loud += 1
            opposed += int(x * y < 0)
        mass += min(abs(x), abs(y))
        lost += (abs(x) + abs(y) - abs(x + y)) / 2
    found = summarize([compare_deltas(Stack.of(factors))], 0, 1)
    assert loud > 500
    assert found.sign_conflict == pytest.approx(opposed / loud, abs=2 / loud)  # float32 at the floor
    assert found.weighted_conflict == pytest.approx(lost / mass, rel=1e-5)


def test_an_adapter_against_itself_and_its_negative() -> None:
    a, b = random_factors(0)
    same = summarize([compare_deltas(Stack.of([(a, b), (a, b)]))], 0, 1)
    assert (same.sign_conflict, same.weighted_conflict) == (0, 0)
    assert (same.cosine, same.row_overlap, same.column_overlap) == pytest.approx((1, 1, 1))
    turned = summarize([compare_deltas(Stack.of([(a, b), (a, -b)]))], 0, 1)
    assert (turned.sign_conflict, turned.weighted_conflict) == (1, 1)
    assert (turned.cosine, turned.row_overlap) == pytest.approx((-1, 1))


def test_orthogonal_adapters_share_nothing() -> None:
    """Each reads coordinates that the other does not."""
    a, b = random_factors(0, columns=30)
    one, other = np.split(np.arange(30), 2)
    factors = [(np.where(np.isin(np.arange(30), half), a, 0), b) for half in (one, other)]
    found = summarize([compare_deltas(Stack.of(factors))], 0, 1)
    figures = (found.cosine, found.row_overlap, found.sign_conflict, found.weighted_conflict)
    assert figures == pytest.approx((0, 0, 0, 0), abs=1e-12)
    assert found.column_overlap == pytest.approx(1)


def test_a_space_inside_a_larger_one_overlaps_fully() -> None:
    a, b = random_factors(0)
    found = summarize([compare_deltas(Stack.of([(a, b), (a[:1], b[:, :1])]))], 0, 1)
    assert (found.row_overlap, found.column_overlap) == pytest.approx((1, 1))


def test_the_rank_of_the_product_counts_not_that_of_its_factors() -> None:
    a, b = random_factors(0, rank=2)
    doubled = (np.concatenate([a, a]), np.concatenate([b, b], axis=1))
    found = summarize([compare_deltas(Stack.of([doubled, random_factors(1, rank=3)]))], 0, 1)
    expected = reference_overlap(dense(doubled), dense(random_factors(1, rank=3)))
    assert found.row_overlap == pytest.approx(expected)


def test_a_module_that_only_one_changes_counts_only_in_its_norm() -> None:
    pair = random_factors(0)
    both = compare_deltas(Stack.of([pair, random_factors(1)]))
    alone = compare_deltas(Stack.of([pair, None]))
    one, found = summarize([both], 0, 1), summarize([both, alone], 0, 1)
    assert found.modules == 1
    assert found.norms == pytest.approx((np.sqrt(2) * one.norms[0], one.norms[1]))
    assert found.cosine == pytest.approx(one.cosine / np.sqrt(2))
    assert (found.row_overlap, found.sign_conflict) == (one.row_overlap, one.sign_conflict)


@settings(max_examples=40)
@given(pairs(), st.integers(0, 1000))
def test_output_products_are_means_over_inputs(factors: list[Factors], seed: int) -> None:
    inputs = np.random.default_rng(seed).normal(size=(20, factors[0][0].shape[1]))
    stack = Stack.of(factors)
    seen = inputs @ stack.a.T
    outputs = [inputs @ dense(pair).T for pair in factors]
    expected = [[(one * other).sum(axis=1).mean() for other in outputs] for one in outputs]
    np.testing.assert_allclose(output_products(stack, seen.T @ seen / 20), expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=40)
@given(pairs())
def test_likely_inputs_are_what_the_delta_reads(factors: list[Factors]) -> None:
    """With E xxᵀ = ΔᵀΔ, E⟨Δp·x, Δq·x⟩ = tr(Δp ΔᵀΔ Δqᵀ)."""
    stack, deltas = Stack.of(factors), [dense(pair) for pair in factors]
    for task, own in enumerate(deltas):
        expected = [[np.trace(one @ own.T @ own @ other.T) for other in deltas] for one in deltas]
        np.testing.assert_allclose(output_products(stack, likely_moments(stack, task)), expected, rtol=1e-6, atol=1e-6)


def test_energies_and_errors_of_a_mix() -> None:
    """Compared with outputs of two layers with two modules each. Each layer is scaled by the energy of the task's adapter."""
    random = np.random.default_rng(0)
    products: dict[str, Doubles] = {}
    energies, errors = [], []
    for layer in range(2):
        total, own, other, missed = np.zeros((2, 2, 2)), 0.0, 0.0, 0.0
        for module in range(2):
            factors = [random_factors(10 * layer + module), random_factors(100 + 10 * layer + module)]
            inputs = [random.normal(size=(50, 30)) * random.uniform(0.5, 2) for _ in factors]
            stack = Stack.of(factors)
            seen = [x @ stack.a.T for x in inputs]
            total += np.stack([output_products(stack, z.T @ z / 50) for z in seen])
            one, two = (inputs[0] @ dense(pair).T for pair in factors)
            own, other = own + (one**2).sum(), other + (two**2).sum()
            missed += ((0.6 * one + 0.7 * two - one) ** 2).sum()
        products[f"layer {layer}"] = total
        energies.append(other / own)
        errors.append(missed / own)
    outputs = relate_outputs(products)
    assert [outputs.energy(0, 1, layer) for layer in products] == pytest.approx(energies)
    assert outputs.energy(0, 1) == pytest.approx(np.mean(energies))
    assert outputs.error(0, {0: 0.6, 1: 0.7}) == pytest.approx(np.mean(errors))
    assert outputs.error(0, {0: 1.0}) == 0
    assert outputs.error(0, {0: 1.0, 1: 1.0}) == pytest.approx(outputs.energy(0, 1))


def test_chosen_weights_have_the_least_worst_error() -> None:
    """Over both tasks and both views."""
    one = relate_outputs({"layer 0": np.array([[[1.0, 0.2], [0.2, 0.5]], [[2.0, -0.1], [-0.1, 1.0]]])})
    two = relate_outputs({"layer 0": np.array([[[1.0, 0.0], [0.0, 2.0]], [[0.1, 0.0], [0.0, 1.0]]])})
    grid = [(a / 10, b / 10) for a in range(2, 13) for b in range(2, 13)]
    for views in ([one], [one, two]):
        worst = {
            pair: max(view.error(task, dict(enumerate(pair))) for task in (0, 1) for view in views)  # by place
            for pair in grid
        }
        assert worst[choose_weights(views, 0, 1)] == min(worst.values())
    assert choose_weights([one], 0, 1) != choose_weights([one, two], 0, 1)


def test_a_layer_that_an_adapter_does_not_change_is_scaled_by_its_others() -> None:
    own, foreign = np.diag([4.0, 0.0]), np.diag([0.0, 2.0])
    outputs = relate_outputs({"layer 0": np.stack([own, own]), "layer 1": np.stack([foreign, foreign])})
    assert outputs.energy(0, 1, "layer 1") == 0.5
    assert outputs.energy(0, 1) == 0.25


def test_independent_adapters_mix_without_loss() -> None:
    """Neither reads what the other reads."""
    a, b = random_factors(0, columns=30)
    halves = np.split(np.arange(30), 2)
    stack = Stack.of([(np.where(np.isin(np.arange(30), half), a, 0), b) for half in halves])
    outputs = relate_outputs({"layer 0": np.stack([output_products(stack, likely_moments(stack, task)) for task in (0, 1)])})
    assert outputs.energy(0, 1) == 0
    assert choose_weights([outputs], 0, 1) == (1.0, 1.0)
