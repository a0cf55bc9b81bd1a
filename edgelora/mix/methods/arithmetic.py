"""Weighted sums of deltas: task arithmetic, as a matrix or exactly as factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelora.mix.methods.deltas import merge_row_blocks
from edgelora.mix.methods.spectra import decompose_product, least_factors, stack_factors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora.mix.methods.deltas import Factors, Floats, Rows


def linear(deltas: Sequence[Rows], weights: Sequence[float]) -> Floats:
    """Task arithmetic: Σ w·Δ (arXiv 2212.04089, section 2)."""

    def add(parts: Sequence[Floats]) -> Floats:
        total: Floats = parts[0] * parts[0].dtype.type(weights[0])
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total += part * part.dtype.type(weight)
        return total

    return merge_row_blocks(add, deltas)


def linear_factors(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Computes the same sum as one product.

    The A's are stacked as rows, and the weighted B's as columns.
    """
    return stack_factors([(a, b * np.float32(weight)) for (a, b), weight in zip(factors, weights, strict=True)])


def least_rank_factors(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Computes the same sum by its SVD.

    The rank is the least that represents it to float32's rounding.
    """
    size = sum(abs(weight) * product_norm(a, b) for (a, b), weight in zip(factors, weights, strict=True))
    return least_factors(*decompose_product(*linear_factors(factors, weights)), size)


def product_norm(a: Floats, b: Floats) -> float:
    """Computes the Frobenius norm of B·A.

    ‖B·A‖² is the sum of the entries of BᵀB ∘ AAᵀ.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))))
