"""Isotropic merging: the sum, with all its singular values made equal.

Iso-C: arXiv 2502.04959, section 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelora.mix.methods.spectra import count_directions, decompose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora.mix.methods.deltas import Floats, Rows


def iso_c(deltas: Sequence[Rows], weights: Sequence[float]) -> Floats:
    """Σ w·Δ = U·Σ·Vᵀ becomes mean(σ)·U·Vᵀ.

    The paper's models differ from their base in all directions. A sum of LoRA deltas has rank Σr, and U and V are arbitrary in
    its null space. So the mean and the product run only over directions above rounding, relative to the norms of the summands.
    Even one adapter at weight 1 changes: the method flattens its spectrum.
    """
    total = np.zeros(deltas[0].shape, np.float64)
    size = 0.0
    for delta, weight in zip(deltas, weights, strict=True):
        values = delta[:].astype(np.float64)
        total += weight * values
        size += abs(weight) * float(np.linalg.norm(values))
    u, s, vt = decompose(total)
    rank = count_directions(s, size)
    if not rank:
        return np.zeros(total.shape, deltas[0].dtype)
    merged: Floats = (float(s[:rank].mean()) * (u[:, :rank] @ vt[:rank])).astype(deltas[0].dtype)
    return merged
