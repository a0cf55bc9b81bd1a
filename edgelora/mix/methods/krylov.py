"""Finds the largest singular values of a large matrix.

A block Krylov method needs few products with the matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgelora.mix.methods.deltas import Floats

    Doubles = NDArray[np.float64]

SPARE = 16  # oversampling: columns of a block beyond the requested singular values
BLOCKS = 4  # maximum number of blocks

_LEFT = 8e-3  # stop when further blocks would reduce the squared error by at most this share of it
_NOISE = 1e-8  # or by at most this share of the squared norm, when the rank holds nearly everything
_ORTHONORMAL = 1e-10  # maximum deviation of QᵀQ from the identity


def find_largest(matrix: Floats, rank: int, size: float) -> tuple[Doubles, Doubles, Doubles]:
    """Finds approximately the largest singular values of a float32 matrix (N, K).

    Returns U (N, rank), s (rank,) and Vᵀ (rank, K). They are exact on the space spanned by M·X, M·Mᵀ·M·X and so on, for random
    columns X (Musco and Musco, arXiv 1504.05477, algorithm 2). Three such blocks are as accurate as subspace iteration after five
    passes. Products with M are in float32, the small matrices in float64. size: the matrix's squared norm. N and K must be at
    least BLOCKS · (rank + SPARE).
    """
    if matrix.shape[0] <= matrix.shape[1]:
        return _search(matrix, rank, size)
    u, s, vt = _search(matrix.T, rank, size)
    return vt.T, s, u.T


def _search(matrix: Floats, rank: int, size: float) -> tuple[Doubles, Doubles, Doubles]:
    """find_largest for N <= K: orthonormalizing columns of the shorter side costs less."""
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
        # Gains shrink by a roughly constant factor. The first gain is the whole sum, so it does not show the factor.
        shrinking = gain / before if count > 1 and before > gain else 0.5
        if gain * shrinking <= max(_LEFT * (size - held) * (1 - shrinking), _NOISE * size):
            break
    s, vectors = np.sqrt(np.maximum(squares[: -rank - 1 : -1], 0)), vectors[:, : -rank - 1 : -1]
    least = max(s[0] * _NOISE, np.finfo(np.float64).tiny)  # avoids dividing by 0 if the matrix has a lower rank
    return basis @ vectors, s, (images @ (vectors / np.maximum(s, least))).T


def _continue(basis: Floats, columns: Floats) -> Floats:
    """Extends a basis by orthonormal columns.

    They are orthogonal to the basis, and span the same space together with it as the given columns do.
    """
    for _ in range(2 if basis.shape[1] else 1):  # a second pass removes what rounding left of the basis
        rest = columns - basis @ (basis.T @ columns)
        columns = orthonormalize(rest.astype(np.float64))[0].astype(np.float32)
    return columns


def orthonormalize(columns: Doubles) -> tuple[Doubles, Doubles]:
    """Decomposes tall columns into Q (N, p), orthonormal, and R (p, p), upper triangular.

    It is CholeskyQR2: a Cholesky decomposition of the Gram matrix, done twice because once squares the condition number (Yamamoto
    et al., "Roundoff error analysis of the CholeskyQR2 algorithm", 2015). It needs only matrix products. LAPACK's reflections
    take six times as long. Wide or dependent columns fall back to numpy's QR.
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
