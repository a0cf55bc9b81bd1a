"""Composition methods: pure functions from weighted deltas, float32 (N, K) each, to one delta."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

DEFAULT_DENSITY = 0.2  # the share that TIES keeps (arXiv 2306.01708, section 5)


def linear(deltas: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """Task arithmetic: Σ w·Δ (arXiv 2212.04089, section 2)."""
    total = np.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total += np.float32(weight) * delta
    return total


def ties(deltas: Sequence[Floats], weights: Sequence[float], *, density: float = DEFAULT_DENSITY) -> Floats:
    """TIES: trim, elect a sign per entry, average what agrees with it (arXiv 2306.01708, section 4).

    Each Δ keeps its largest `density` share by magnitude and is then weighted; the sign is that of the weighted sum; the
    result is the sum of the agreeing weighted entries divided by their count. (mergekit divides by their weights instead,
    which takes the scale out of the weights; PEFT elects the sign before weighting.)
    """
    weighted = np.stack([np.float32(weight) * trim(delta, density) for delta, weight in zip(deltas, weights, strict=True)])
    elected = np.sign(weighted.sum(axis=0))
    agrees = (np.sign(weighted) == elected) & (weighted != 0)
    total = np.where(agrees, weighted, np.float32(0)).sum(axis=0)
    merged: Floats = total / np.maximum(agrees.sum(axis=0), 1)
    return merged.astype(np.float32, copy=False)


def trim(delta: Floats, density: float) -> Floats:
    """Zeroes all but the largest `density` share of the entries by magnitude; equals at the edge are all kept."""
    if not 0 < density <= 1:
        raise InputError(f"density = {density}: use a share, more than 0 and at most 1")
    magnitudes = np.abs(delta)
    kept = math.ceil(density * delta.size)
    threshold = np.partition(magnitudes, delta.size - kept, axis=None)[delta.size - kept]
    return np.where(magnitudes >= threshold, delta, np.float32(0))


def truncate(delta: Floats, rank: int) -> tuple[Floats, Floats, float]:
    """The nearest matrix of a rank (Eckart-Young): A (rank, K), B (N, rank), and the relative error ‖Δ - B·A‖ / ‖Δ‖.

    The singular value decomposition runs in float64; each factor takes the square root of the singular values.
    """
    u, s, vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    rank = min(rank, len(s))
    root = np.sqrt(s[:rank])
    norm = float(np.linalg.norm(s))
    error = float(np.linalg.norm(s[rank:])) / norm if norm else 0.0
    return (root[:, None] * vt[:rank]).astype(np.float32), (u[:, :rank] * root).astype(np.float32), error
