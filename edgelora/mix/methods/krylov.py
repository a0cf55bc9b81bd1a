"""The largest singular values of a large matrix, from a block Krylov space: few products with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgelora.mix.methods.deltas import Floats

    Doubles = NDArray[np.float64]

SPARE = 16  # columns of a block beyond the singular values that are asked for
BLOCKS = 4  # at most

_LEFT = 8e-3  # it ends when all further blocks would take no more off the square of the error, relative to that square
_NOISE = 1e-8  # or this little of all, where the rank holds nearly everything
_ORTHONORMAL = 1e-10  # the most that products of columns may differ from those of orthonormal ones


def find_largest(matrix: Floats, rank: int, size: float) -> tuple[Doubles, Doubles, Doubles]:
    """U (N, rank), s (rank,) and Vᵀ (rank, K) of about the largest singular values of a float32 matrix (N, K).

    They are the matrix's on the space of M·X, M·Mᵀ·M·X and so on, of random columns X (Musco and Musco, arXiv 1504.05477,
    algorithm 2): after three such blocks as near as subspace iteration after five passes. Products are in float32, what small
    matrices remain in float64. size: the square of the matrix's norm. N and K are at least BLOCKS · (rank + SPARE).
    """
    if matrix.shape[0] <= matrix.shape[1]:
        return _search(matrix, rank, size)
    u, s, vt = _search(matrix.T, rank, size)
    return vt.T, s, u.T


def _search(matrix: Floats, rank: int, size: float) -> tuple[Doubles, Doubles, Doubles]:
    """For a matrix no taller than wide: the shorter side is where columns cost less to be made orthonormal."""
    block: Floats = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + SPARE), np.float32)
    basis, images = np.zeros((matrix.shape[0], 0), np.float32), np.zeros((matrix.shape[1], 0))
    held, gain, products = 0.0, 0.0, np.zeros((0, 0))
    for count in range(BLOCKS):
        added = _continue(basis, matrix @ block)
        block = matrix.T @ added
        image = block.astype(np.float64)
        across = images.T @ image
        products = np.block([[products, across], [across.T, image.T @ image]])
        basis, images = np.concatenate([basis, added], axis=1), np.concatenate([images, image], axis=1)
        squares, vectors = np.linalg.eigh(products)
        before, gain = gain, float(squares[-rank:].sum()) - held
        held += gain
        # Gains shrink by about the same factor each time; the first one, of everything, says nothing of it.
        shrinking = gain / before if count > 1 and before > gain else 0.5
        if gain * shrinking <= max(_LEFT * (size - held) * (1 - shrinking), _NOISE * size):
            break
    s, vectors = np.sqrt(np.maximum(squares[: -rank - 1 : -1], 0)), vectors[:, : -rank - 1 : -1]
    least = max(s[0] * _NOISE, np.finfo(np.float64).tiny)  # what is divided by where a matrix has fewer directions
    return basis @ vectors, s, (images @ (vectors / np.maximum(s, least))).T


def _continue(basis: Floats, columns: Floats) -> Floats:
    """Orthonormal columns that are orthogonal to a basis, and span with it what the given ones do."""
    for _ in range(2 if basis.shape[1] else 1):  # what is small after the first time is orthogonal after the second
        rest = columns - basis @ (basis.T @ columns)
        columns = orthonormalize(rest.astype(np.float64))[0].astype(np.float32)
    return columns


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
