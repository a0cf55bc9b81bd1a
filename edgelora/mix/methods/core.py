"""Core space: any method on small matrices that hold all the adapters exactly (arXiv 2509.17786)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.mix.methods.spectra import decompose, least_factors, left_singular_vectors, stack_factors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgelora.mix.methods.deltas import Factors, Floats


def in_core_space(merge: Callable[..., Floats]) -> Callable[..., Factors]:
    """A method on deltas as one on factors A (r, K), B (N, r), by way of cores of at most (Σr, Σr); the result is exact.

    U are the left singular vectors of the B's side by side, V the right ones of the A's on top of each other; the core of an
    adapter is Uᵀ·B·A·V, and the merged core goes back by U and Vᵀ, as in the paper's code
    (https://github.com/apanariello4/core-space-merging/blob/e66f357165fa879b05602a470e84b39b198f5a3b/task_merger.py).
    For methods that commute with a change of orthonormal basis (sums, tsv, iso_c) this equals the method on the deltas. ties
    does not: there it is another method, in the paper's basis. Where singular values of the stacked factors coincide (A's
    orthonormal to each other), that basis, and with it core_ties, hangs on rounding.
    """

    def merge_factors(factors: Sequence[Factors], weights: Sequence[float], **options: Any) -> Factors:
        a, b = stack_factors(factors)
        left, right = left_singular_vectors(b), left_singular_vectors(a.T)
        cores = [(left.T @ b.astype(np.float64)) @ (a.astype(np.float64) @ right) for a, b in factors]
        size = sum(abs(weight) * float(np.linalg.norm(core)) for core, weight in zip(cores, weights, strict=True))
        u, s, vt = decompose(merge(cores, weights, **options))
        return least_factors(left @ u, s, vt @ right.T, size)

    return merge_factors
