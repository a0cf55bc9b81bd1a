"""TIES: trim, elect a sign per entry, average what agrees with it (arXiv 2306.01708, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelora.methods.deltas import by_runs
from edgelora.methods.magnitude import trim_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora.methods.deltas import Floats, Rows

_TIE = 1e-6  # a vote whose margin is this small a share of all votes is decided by rounding: it elects nothing


def ties(deltas: Sequence[Rows], weights: Sequence[float], *, density: float) -> Floats:
    """TIES with weights: the sum of the agreeing weighted entries over their count.

    Each Δ keeps its largest `density` share and is then weighted; the sign is that of the weighted sum. A delta of negative
    weight votes with its signs turned, and is subtracted where it agrees. The paper has no weights and scales its result by
    one λ, which is one weight for all here. PEFT trims and divides as here, but elects on unweighted deltas (merge_utils.py
    of 0.21), so that a delta of small weight can outvote the rest; mergekit elects as here and divides as ties_weighted.
    """
    return elect(trim_all(deltas, density), weights, [1.0] * len(weights))


def ties_weighted(deltas: Sequence[Rows], weights: Sequence[float], *, density: float) -> Floats:
    """TIES whose sum of the agreeing weighted entries is divided by the sum of their weights, which takes the scale out.

    mergekit's convention with normalize, its default for ties
    (https://github.com/arcee-ai/mergekit/blob/0031a40ae4692ee2da83448668048a51bf8bbf4b/mergekit/merge_methods/generalized_task_arithmetic.py),
    but for negative weights: they count by their size here, where mergekit's sum may be 0 or turn the sign.
    """
    return elect(trim_all(deltas, density), weights, [abs(weight) for weight in weights])


def elect(deltas: Sequence[Rows], weights: Sequence[float], shares: Sequence[float]) -> Floats:
    """Per entry the sum of the weighted deltas of the elected sign, over the sum of the shares of those deltas."""

    def merge(parts: Sequence[Floats]) -> Floats:
        kind = parts[0].dtype.type
        up, down, up_shares, down_shares = (np.zeros_like(parts[0]) for _ in range(4))
        for part, weight, share in zip(parts, weights, shares, strict=True):
            vote = part * kind(weight)
            up += np.maximum(vote, kind(0))
            down += np.minimum(vote, kind(0))
            up_shares += (vote > 0) * kind(share)
            down_shares += (vote < 0) * kind(share)
        margin = up + down
        is_up = margin > 0
        merged: Floats = np.where(is_up, up, down)
        divisor = np.where(is_up, up_shares, down_shares)
        decided = np.abs(margin) > kind(_TIE) * (up - down)
        np.divide(merged, divisor, out=merged, where=decided)
        merged[~decided] = 0
        return merged

    return by_runs(merge, deltas)
