"""Task singular vectors: makes all tasks' directions orthogonal.

TSV-Merge: arXiv 2412.00081.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelora.mix.methods.spectra import ROUNDING, count_directions, decompose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgelora.mix.methods.deltas import Floats, Rows

    Doubles = NDArray[np.float64]


def tsv(deltas: Sequence[Rows], weights: Sequence[float]) -> Floats:
    """Makes the tasks' singular vectors orthogonal, and recombines them.

    The vectors are concatenated, and U and V replaced by the nearest orthogonal matrices. Each task's singular values are
    multiplied by its weight. The paper has one factor on the result. The paper's code
    (https://github.com/AntoAndGar/task_singular_vectors/blob/0f872b407d82e48052c0b5261acf4eca3ae3ced5/src/utils/TSVM_utils.py)
    truncates each task to its largest min(N, K) / T directions so that all fit. Here this happens only if they would not fit
    otherwise.
    If tasks share directions, the concatenated vectors have a null space, and the nearest orthogonal matrix is not unique. The
    one of least norm is used, so that weights w and -w of one task cancel.
    """
    shape = deltas[0].shape
    parts = [decompose(delta[:]) for delta in deltas]
    ranks = [count_directions(s, float(np.linalg.norm(s))) for _, s, _ in parts]
    if sum(ranks) > min(shape):
        ranks = [min(rank, max(1, min(shape) // len(deltas))) for rank in ranks]
    if not any(ranks):
        return np.zeros(shape, deltas[0].dtype)
    u = np.concatenate([left[:, :rank] for (left, _, _), rank in zip(parts, ranks, strict=True)], axis=1)
    v = np.concatenate([right[:rank].T for (_, _, right), rank in zip(parts, ranks, strict=True)], axis=1)
    s = np.concatenate([w * values[:rank] for (_, values, _), rank, w in zip(parts, ranks, weights, strict=True)])
    merged: Floats = ((_orthogonalize(u) * s) @ _orthogonalize(v).T).astype(deltas[0].dtype)
    return merged


def _orthogonalize(columns: Doubles) -> Doubles:
    """Returns the nearest matrix with orthonormal columns (the polar factor).

    It is restricted to the directions that the columns span.
    """
    u, s, vt = decompose(columns)
    spanned = s > ROUNDING * s[0]
    nearest: Doubles = u[:, spanned] @ vt[spanned]
    return nearest
