"""Singular values in float64: of matrices, of products B·A without forming them, and the nearest product of a rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.methods.deltas import runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgelora.methods.deltas import Factors, Floats

    Doubles = NDArray[np.float64]

ROUNDING = 1e-6  # singular values below this share of what they are compared with are float32's rounding, not directions

_SPARE = 16  # directions beyond the rank that the iteration carries along
_SETTLED = 3e-3  # it ends when a pass takes no more off the square of the error, relative to that square
_NOISE = 1e-8  # or this little of all, where the rank holds nearly everything
_PASSES = 12
_ORTHONORMAL = 1e-10  # the most that products of columns may differ from those of orthonormal ones


def decompose(matrix: Any) -> tuple[Doubles, Doubles, Doubles]:
    """U (N, p), s (p,) and Vᵀ (p, K) of a matrix, in float64."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u, s, vt


def decompose_product(a: Floats, b: Floats) -> tuple[Doubles, Doubles, Doubles]:
    """The same of B·A, by way of the QR decompositions of its factors: nothing larger than they are is formed."""
    left, middle = np.linalg.qr(b.astype(np.float64))
    right, other = np.linalg.qr(a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(middle @ other.T, full_matrices=False)
    return left @ u, s, vt @ right.T


def left_singular_vectors(matrix: Floats) -> Doubles:
    """U (N, p) of a tall matrix, float64."""
    q, r = np.linalg.qr(matrix.astype(np.float64))
    u: Doubles = q @ np.linalg.svd(r, full_matrices=False)[0]
    return u


def stack_factors(factors: Sequence[Factors]) -> Factors:
    """A (Σr, K) and B (N, Σr), whose product is the sum of the products."""
    return np.concatenate([a for a, _ in factors]), np.concatenate([b for _, b in factors], axis=1)


def split_evenly(u: Doubles, s: Doubles, vt: Doubles) -> Factors:
    """A (p, K) and B (N, p), float32, each with the square roots of the singular values."""
    root = np.sqrt(s)
    return (root[:, None] * vt).astype(np.float32), (u * root).astype(np.float32)


def count_directions(s: Doubles, size: float) -> int:
    """How many of the falling singular values are more than rounding, for matrices of a Frobenius norm."""
    return int(np.count_nonzero(s > ROUNDING * size))


def least_factors(u: Doubles, s: Doubles, vt: Doubles, size: float) -> Factors:
    """U·s·Vᵀ as the factors of least rank, at least 1. size: the Frobenius norm that rounding is measured by."""
    rank = max(1, count_directions(s, size))
    return split_evenly(u[:, :rank], s[:rank], vt[:rank])


def truncate_product(a: Floats, b: Floats, rank: int) -> tuple[Floats, Floats, float]:
    """The nearest product of a rank to B·A (Eckart-Young): A (rank, K), B (N, rank), the relative error."""
    return _cut(*decompose_product(a, b), rank)


def truncate(delta: Floats, rank: int) -> tuple[Floats, Floats, float]:
    """The nearest matrix of a rank (Eckart-Young): A (rank, K), B (N, rank), and the relative error ‖Δ - B·A‖ / ‖Δ‖.

    Small matrices are decomposed whole, in float64. For large ones it is subspace iteration (Halko et al., arXiv 0909.4061,
    algorithm 4.4) with float32 products and float64 decompositions, until a pass takes no more than 0.3% off the square of
    the error, which then is within 0.4% of the least one for Gaussian noise and 0.2% for merged adapters. The error that is
    returned is that of the factors, computed from them.
    """
    rank = min(rank, *delta.shape)
    if 4 * (rank + _SPARE) > min(delta.shape):
        return _cut(*decompose(delta), rank)
    a, b = split_evenly(*_iterate(delta, rank))
    error, size = 0.0, 0.0
    for rows in runs(delta.shape):
        part = delta[rows].ravel()
        rest = part - (b[rows] @ a).ravel()
        error, size = error + float(rest @ rest), size + float(part @ part)
    return a, b, math.sqrt(error / size) if size else 0.0


def _cut(u: Doubles, s: Doubles, vt: Doubles, rank: int) -> tuple[Floats, Floats, float]:
    rank = min(rank, len(s))
    norm = float(np.linalg.norm(s))
    error = float(np.linalg.norm(s[rank:])) / norm if norm else 0.0
    return *split_evenly(u[:, :rank], s[:rank], vt[:rank]), error


def _iterate(delta: Floats, rank: int) -> tuple[Doubles, Doubles, Doubles]:
    """U, s and Vᵀ of about the largest `rank` singular values of a float32 matrix."""
    columns = np.random.default_rng(0).standard_normal((delta.shape[1], rank + _SPARE), np.float32)
    size, before = sum(float(row @ row) for row in delta), 0.0
    for _ in range(_PASSES):
        left = orthonormalize((delta @ columns).astype(np.float64))[0].astype(np.float32)
        q, r = orthonormalize((delta.T @ left).astype(np.float64))
        v, s, ut = np.linalg.svd(r)
        held = float(np.square(s[:rank]).sum())
        if held - before <= max(_SETTLED * (size - held), _NOISE * size):
            break
        before, columns = held, q.astype(np.float32)
    return left @ ut[:rank].T, s[:rank], (q @ v[:, :rank]).T


def orthonormalize(columns: Doubles) -> tuple[Doubles, Doubles]:
    """Q (N, p), orthonormal, and R (p, p), upper triangular, of tall columns Q·R; of wide or dependent ones as numpy has them.

    By Cholesky decompositions of the Gram matrix, twice since one squares the condition number (Yamamoto et al., "Roundoff error
    analysis of the CholeskyQR2 algorithm", 2015): products alone, where LAPACK's reflections take six times as long.
    """
    q, r = columns, np.eye(columns.shape[1])
    try:
        for _ in range(2):
            step = np.linalg.cholesky(q.T @ q).T
            q, r = q @ np.linalg.inv(step), step @ r
    except np.linalg.LinAlgError:
        return np.linalg.qr(columns)
    if not np.abs(q.T @ q - np.eye(len(r))).max() < _ORTHONORMAL:
        return np.linalg.qr(columns)
    return q, r
