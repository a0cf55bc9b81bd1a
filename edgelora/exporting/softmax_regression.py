"""Multinomial logistic regression on sparse rows, in numpy.

The problem is convex, so the result depends only on the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]
    Indices = NDArray[np.int64]

_STEPS = 100  # maximum L-BFGS iterations
_MEMORY = 8  # pairs of steps and gradient changes that L-BFGS keeps
_TOLERANCE = 1e-6  # on the gradient's largest entry
_TEMPERATURES = np.geomspace(0.25, 4.0, 65)


@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix (count, width), as its M entries.

    rows, columns: int64 (M,). values: float64 (M,).
    """

    rows: Indices
    columns: Indices
    values: Doubles
    count: int
    width: int

    @classmethod
    def stack(cls, rows: Sequence[tuple[NDArray[np.int64], NDArray[np.floating]]], width: int) -> SparseRows:
        """Makes a matrix from the columns and values of each row."""
        lengths = [len(columns) for columns, _ in rows]
        return cls(
            np.repeat(np.arange(len(rows)), lengths),
            np.concatenate([columns for columns, _ in rows] or [np.zeros(0, np.int64)]),
            np.concatenate([values for _, values in rows] or [np.zeros(0)]).astype(np.float64),
            len(rows),
            width,
        )

    def times(self, weights: Doubles) -> Doubles:
        """X·W for W (classes, width), as (count, classes)."""
        products = [np.bincount(self.rows, each[self.columns] * self.values, self.count) for each in weights]
        return np.stack(products, axis=1)

    def transposed_times(self, residuals: Doubles) -> Doubles:
        """(Xᵀ·R)ᵀ for R (count, classes), as (classes, width)."""
        products = [np.bincount(self.columns, each[self.rows] * self.values, self.width) for each in residuals.T]
        return np.stack(products)


def fit_softmax(rows: SparseRows, labels: Indices, classes: int, *, penalty: float) -> tuple[Doubles, Doubles]:
    """Fits weights (classes, width) and bias (classes,).

    Every class counts the same, however many rows it has.
    labels: class of each row, int64 (count,). The loss is the mean over classes of each class's mean negative log likelihood, in
    nats, plus penalty / 2 · ‖weights‖².
    """
    importance = balance(labels)
    right = np.eye(classes)[labels]
    shape = (classes, rows.width)

    def loss(point: Doubles) -> tuple[float, Doubles]:
        weights, bias = point[:-classes].reshape(shape), point[-classes:]
        log_likelihoods = log_softmax(rows.times(weights) + bias)
        residuals = (np.exp(log_likelihoods) - right) * importance[:, None]
        gradient = rows.transposed_times(residuals) + penalty * weights
        fit = -float((importance * log_likelihoods[np.arange(rows.count), labels]).sum())
        return fit + penalty / 2 * float((weights**2).sum()), np.concatenate([gradient.ravel(), residuals.sum(axis=0)])

    point = minimize(loss, np.zeros(classes * (rows.width + 1)))
    return point[:-classes].reshape(shape), point[-classes:]


def find_temperature(scores: Doubles, labels: Indices) -> float:
    """Finds the divisor of scores (count, classes) at which their softmax has the least loss.

    Returns 1 without rows.
    """
    if not len(labels):
        return 1.0
    importance, at = balance(labels), np.arange(len(labels))
    losses = [-(importance * log_softmax(scores / temperature)[at, labels]).sum() for temperature in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def balance(labels: Indices) -> Doubles:
    """Returns row weights, float64 (count,), that sum to 1.

    Each class that occurs has the same total.
    """
    counts = np.bincount(labels)
    weights: Doubles = 1 / counts[labels] / np.count_nonzero(counts)
    return weights


def log_softmax(scores: Doubles) -> Doubles:
    """Log probabilities (count, classes) of scores (count, classes)."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    found: Doubles = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def minimize(function: Callable[[Doubles], tuple[float, Doubles]], start: Doubles) -> Doubles:
    """Minimizes a smooth convex function that returns its value and gradient.

    L-BFGS with backtracking line search: Nocedal and Wright, Numerical Optimization, 2nd edition, algorithms 3.1 and 7.4.
    """
    point, (value, gradient) = start, function(start)
    pairs: list[tuple[Doubles, Doubles]] = []
    for _ in range(_STEPS):
        if np.abs(gradient).max() < _TOLERANCE:
            break
        direction = -_approximate_newton(gradient, pairs)
        slope, length = _dot(gradient, direction), 1.0
        while length > 1e-10:
            reached = point + length * direction
            lower, steepest = function(reached)
            if lower <= value + 1e-4 * length * slope:
                break
            length /= 2
        else:
            break  # no further decrease within float64's rounding
        step, change = reached - point, steepest - gradient
        if _dot(step, change) > 0:
            pairs = [*pairs, (step, change)][-_MEMORY:]
        point, value, gradient = reached, lower, steepest
    return point


def _approximate_newton(gradient: Doubles, pairs: Sequence[tuple[Doubles, Doubles]]) -> Doubles:
    """The inverse Hessian, approximated from the pairs, times the gradient."""
    found, factors = gradient.copy(), []
    for step, change in reversed(pairs):
        factors.append(_dot(step, found) / _dot(step, change))
        found -= factors[-1] * change
    if pairs:
        step, change = pairs[-1]
        found *= _dot(step, change) / _dot(change, change)
    else:
        found /= max(1.0, math.sqrt(_dot(gradient, gradient)))
    for (step, change), factor in zip(pairs, reversed(factors), strict=True):
        found += (factor - _dot(change, found) / _dot(step, change)) * step
    return found


def _dot(one: Doubles, other: Doubles) -> float:
    """Returns the dot product without BLAS.

    BLAS threads sum in varying order, and are slow on busy cores.
    """
    return float((one * other).sum())
