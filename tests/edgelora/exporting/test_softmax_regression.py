"""The regression against torch in float64, and sparse products against dense ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from edgelora.exporting.softmax_regression import SparseRows, balance, find_temperature, fit_softmax, log_softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

LABELS = np.repeat([0, 1, 2], (30, 5, 15))  # classes of unequal size


def dense_rows(seed: int = 0, width: int = 12) -> Doubles:
    """Sparse rows that correlate with their labels; one row is all zeros."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(len(LABELS), width)) + LABELS[:, None] * rng.normal(size=width)
    rows[rng.random(rows.shape) < 0.6] = 0
    rows[7] = 0
    return rows


def sparse(dense: Doubles) -> SparseRows:
    return SparseRows.stack([(np.flatnonzero(row), row[row != 0]) for row in dense], dense.shape[1])


def test_sparse_products_are_dense_products() -> None:
    dense, rng = dense_rows(), np.random.default_rng(1)
    rows, weights, residuals = sparse(dense), rng.normal(size=(3, 12)), rng.normal(size=(len(dense), 3))
    np.testing.assert_allclose(rows.times(weights), dense @ weights.T, atol=1e-12)
    np.testing.assert_allclose(rows.transposed_times(residuals), residuals.T @ dense, atol=1e-12)
    empty = SparseRows.stack([], 12)
    assert empty.times(weights).shape == (0, 3)


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_the_optimum_is_torchs(penalty: float) -> None:
    """torch's loss with class weights, gradients and L-BFGS."""
    dense = dense_rows()
    weights, bias = fit_softmax(sparse(dense), LABELS, 3, penalty=penalty)
    inputs, labels = torch.from_numpy(dense), torch.from_numpy(LABELS)
    theirs, their_bias = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 12), (3,)))
    class_weights = 1 / torch.bincount(labels).double()

    def loss() -> torch.Tensor:
        found = torch.nn.functional.cross_entropy(inputs @ theirs.T + their_bias, labels, weight=class_weights)
        return found + penalty / 2 * (theirs**2).sum()

    optimizer = torch.optim.LBFGS(
        [theirs, their_bias], max_iter=2000, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        found = loss()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(weights, theirs.detach().numpy(), atol=1e-3)
    shift = their_bias.detach().numpy()
    np.testing.assert_allclose(bias - bias.mean(), shift - shift.mean(), atol=1e-3)


def test_the_same_rows_give_the_same_bytes() -> None:
    one, other = (fit_softmax(sparse(dense_rows()), LABELS, 3, penalty=1e-3) for _ in range(2))
    assert one[0].tobytes() == other[0].tobytes()
    assert one[1].tobytes() == other[1].tobytes()


def test_classes_count_the_same_however_many_rows_they_have() -> None:
    weights = balance(LABELS)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose([weights[label == LABELS].sum() for label in range(3)], 1 / 3)
    assert balance(np.array([0, 2])).tolist() == [0.5, 0.5]  # a class without rows has no weight


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_a_scale(scale: float) -> None:
    """With labels drawn from a softmax of scores, the temperature of scaled scores is the scale."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4000, 3)) * 2
    labels = (scores + rng.gumbel(size=scores.shape)).argmax(axis=1)
    assert find_temperature(scores * scale, labels) == pytest.approx(scale, rel=0.1)


def test_no_rows_leave_the_scores_as_they_are() -> None:
    assert find_temperature(np.zeros((0, 3)), np.zeros(0, np.int64)) == 1.0


def test_log_softmax_of_large_scores() -> None:
    np.testing.assert_allclose(log_softmax(np.array([[1000.0, 0.0]])), [[0.0, -1000.0]], atol=1e-9)
