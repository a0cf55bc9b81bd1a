"""Core space: applies a method to small matrices that represent all adapters.

The representation is exact (arXiv 2509.17786).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.mix.methods.spectra import decompose, least_factors, left_singular_vectors, stack_factors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgelora.mix.methods.deltas import Factors, Floats


def in_core_space(merge: Callable[..., Floats]) -> Callable[..., Factors]:
    """Turns a method on deltas into one on factors A (r, K), B (N, r).

    It merges cores of at most (Σr, Σr), and the result is exact.
    U holds the left singular vectors of the B's stacked as columns, V the right ones of the A's stacked as rows. An adapter's
    core is Uᵀ·B·A·V, and U and Vᵀ map the merged core back, as in the paper's code
    (https://github.com/apanariello4/core-space-merging/blob/e66f357165fa879b05602a470e84b39b198f5a3b/task_merger.py).
    For methods that commute with a change of orthonormal basis (sums, tsv, iso_c), the result is that of the method on the
    deltas. ties does not commute, so in the paper's basis it is a different method. If singular values of the stacked factors
    coincide (A's that are orthonormal to each other), rounding decides that basis, and so the result of core_ties.
    """

    def merge_factors(factors: Sequence[Factors], weights: Sequence[float], **options: Any) -> Factors:
        a, b = stack_factors(factors)
        left, right = left_singular_vectors(b), left_singular_vectors(a.T)
        cores = [(left.T @ b.astype(np.float64)) @ (a.astype(np.float64) @ right) for a, b in factors]
        size = sum(abs(weight) * float(np.linalg.norm(core)) for core, weight in zip(cores, weights, strict=True))
        u, s, vt = decompose(merge(cores, weights, **options))
        return least_factors(left @ u, s, vt @ right.T, size)

    return merge_factors
