"""Singular value decompositions in float64, and low-rank approximations.

Products B·A are decomposed without forming them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.mix.methods.deltas import map_row_blocks, row_blocks
from edgelora.mix.methods.krylov import BLOCKS, SPARE, find_largest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgelora.mix.methods.deltas import Factors, Floats

    Doubles = NDArray[np.float64]

ROUNDING = 1e-6  # singular values below this share of the norm are float32 rounding, not directions
_NORMS = 1e-2  # above this share of the squared norm, the squared error can be the difference of two squared norms


def decompose(matrix: Any) -> tuple[Doubles, Doubles, Doubles]:
    """Decomposes a matrix by SVD into U (N, p), s (p,) and Vᵀ (p, K), in float64."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u, s, vt


def decompose_product(a: Floats, b: Floats) -> tuple[Doubles, Doubles, Doubles]:
    """Decomposes B·A by SVD, from QR decompositions of its factors.

    Forms nothing larger than the factors.
    """
    left, middle = np.linalg.qr(b.astype(np.float64))
    right, other = np.linalg.qr(a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(middle @ other.T, full_matrices=False)
    return left @ u, s, vt @ right.T


def left_singular_vectors(matrix: Floats) -> Doubles:
    """The left singular vectors U (N, p) of a tall matrix, float64."""
    q, r = np.linalg.qr(matrix.astype(np.float64))
    u: Doubles = q @ np.linalg.svd(r, full_matrices=False)[0]
    return u


def stack_factors(factors: Sequence[Factors]) -> Factors:
    """Stacks products into A (Σr, K) and B (N, Σr), whose product is their sum."""
    return np.concatenate([a for a, _ in factors]), np.concatenate([b for _, b in factors], axis=1)


def split_evenly(u: Doubles, s: Doubles, vt: Doubles) -> Factors:
    """Returns A (p, K) and B (N, p), float32.

    Each has the square roots of the singular values.
    """
    root = np.sqrt(s)
    return (root[:, None] * vt).astype(np.float32), (u * root).astype(np.float32)


def count_directions(s: Doubles, size: float) -> int:
    """Counts the singular values that exceed rounding: the numerical rank.

    s: in descending order. size: the Frobenius norm.
    """
    return int(np.count_nonzero(s > ROUNDING * size))


def least_factors(u: Doubles, s: Doubles, vt: Doubles, size: float) -> Factors:
    """Returns U·s·Vᵀ as factors of the least rank, at least 1.

    size: the Frobenius norm that rounding is relative to.
    """
    rank = max(1, count_directions(s, size))
    return split_evenly(u[:, :rank], s[:rank], vt[:rank])


def truncate_product(a: Floats, b: Floats, rank: int) -> tuple[Floats, Floats, float]:
    """Finds the nearest product of this rank to B·A (Eckart-Young).

    Returns A (rank, K), B (N, rank) and the relative error.
    """
    return _cut(*decompose_product(a, b), rank)


def truncate(delta: Floats, rank: int) -> tuple[Floats, Floats, float]:
    """Finds the nearest matrix of this rank (Eckart-Young), as factors.

    Returns A (rank, K), B (N, rank), and the relative error ‖Δ - B·A‖ / ‖Δ‖.
    Small matrices are decomposed whole, in float64. Large ones use a block Krylov method, whose error is within 0.4% of the least
    possible (see krylov.py). The returned error is the actual error of the factors.
    """
    rank = min(rank, *delta.shape)
    if BLOCKS * (rank + SPARE) > min(delta.shape):
        return _cut(*decompose(delta), rank)
    size = _square(delta)
    u, s, vt = find_largest(delta, rank, size)
    a, b = split_evenly(u, s, vt)
    if not size:
        return a, b, 0.0
    rest = size - float(s @ s)  # U is orthonormal and s·Vᵀ is UᵀΔ
    if rest < _NORMS * size:
        rest = sum(map_row_blocks(lambda rows: _square(delta[rows] - b[rows] @ a), delta.shape))
    return a, b, math.sqrt(rest / size)


def _square(matrix: Floats) -> float:
    """The squared Frobenius norm of a float32 matrix."""
    return sum(float(part @ part) for part in (matrix[rows].ravel() for rows in row_blocks(matrix.shape)))


def _cut(u: Doubles, s: Doubles, vt: Doubles, rank: int) -> tuple[Floats, Floats, float]:
    rank = min(rank, len(s))
    norm = float(np.linalg.norm(s))
    error = float(np.linalg.norm(s[rank:])) / norm if norm else 0.0
    return *split_evenly(u[:, :rank], s[:rank], vt[:rank]), error
