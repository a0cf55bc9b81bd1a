"""KnOTS: applies a method to the parts of one SVD of all deltas.

The deltas are concatenated (arXiv 2410.19735).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.mix.methods.spectra import count_directions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgelora.mix.methods.deltas import Factors, Floats


def in_knots_space(merge: Callable[..., Floats]) -> Callable[..., Factors]:
    """Turns a method on deltas into one on factors A (r, K), B (N, r) with KnOTS.

    The result is exact. [Δ₁ … Δ_T] = U·S·[V₁ … V_T]ᵀ, without directions below rounding. The method merges the S·V_tᵀ, each (p,
    K), and U maps the result back. The wide matrix is never formed: after QR decompositions of the concatenated B's and of each
    Aᵀ, its singular values are those of a matrix (Σr, Σr). Trimming is per module here. The paper's code trims all modules at
    once.
    """

    def merge_factors(factors: Sequence[Factors], weights: Sequence[float], **options: Any) -> Factors:
        doubles = [(a.astype(np.float64), b.astype(np.float64)) for a, b in factors]
        basis, rows = np.linalg.qr(np.concatenate([b for _, b in doubles], axis=1))
        ends = np.cumsum([len(a) for a, _ in doubles])[:-1]
        small = [part @ np.linalg.qr(a.T)[1].T for part, (a, _) in zip(np.split(rows, ends, axis=1), doubles, strict=True)]
        u, s, _ = np.linalg.svd(np.concatenate(small, axis=1), full_matrices=False)
        u = basis @ u[:, : max(1, count_directions(s, float(np.linalg.norm(s))))]
        merged = merge([(u.T @ b) @ a for a, b in doubles], weights, **options)
        return merged.astype(np.float32), u.astype(np.float32)

    return merge_factors
