"""TIES: trims, elects a sign per entry, and averages the entries of that sign.

Source: arXiv 2306.01708, section 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelora.mix.methods.deltas import merge_row_blocks
from edgelora.mix.methods.magnitude import trim_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora.mix.methods.deltas import Floats, Rows

_TIE = 1e-6  # if the margin of a vote is below this share of all votes, rounding decides it, and it elects nothing


def ties(deltas: Sequence[Rows], weights: Sequence[float], *, density: float) -> Floats:
    """Merges by TIES with weights, dividing the agreeing entries' sum by their count.

    Each Δ is trimmed to its largest `density` share and then weighted. The elected sign is that of the weighted sum. A delta with
    a negative weight votes with flipped signs, and is subtracted where it agrees. The paper has no weights, and scales the result
    by one λ: here that is the same weight for all. PEFT trims and divides the same way but elects on unweighted deltas
    (merge_utils.py of 0.21), so a delta with a small weight can outvote the rest. mergekit elects the same way and divides as
    ties_weighted.
    """
    return elect(trim_all(deltas, density), weights)


def ties_weighted(deltas: Sequence[Rows], weights: Sequence[float], *, density: float) -> Floats:
    """Merges by TIES, dividing the agreeing entries' sum by the sum of their weights.

    Scaling all weights changes nothing. This is mergekit's convention with normalize, its default for ties
    (https://github.com/arcee-ai/mergekit/blob/0031a40ae4692ee2da83448668048a51bf8bbf4b/mergekit/merge_methods/generalized_task_arithmetic.py),
    except for negative weights: here their absolute values are summed, while mergekit's sum can be 0 or flip the sign.
    """
    return elect(trim_all(deltas, density), weights, [abs(weight) for weight in weights])


def elect(deltas: Sequence[Rows], weights: Sequence[float], shares: Sequence[float] | None = None) -> Floats:
    """Sums per entry the weighted deltas of the elected sign.

    The sum is divided by their count, or by the sum of their shares.
    """

    def merge(parts: Sequence[Floats]) -> Floats:
        kind = parts[0].dtype
        total, sizes, vote = np.zeros_like(parts[0]), np.zeros_like(parts[0]), np.empty_like(parts[0])
        counts = np.min_scalar_type(len(parts)) if shares is None else kind
        is_for, is_against = np.zeros(total.shape, counts), np.zeros(total.shape, counts)
        for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            np.multiply(part, kind.type(weight), out=vote)
            share = counts.type(1 if shares is None else shares[index])
            is_for += (vote > 0) * share
            is_against += (vote < 0) * share
            total += vote
            sizes += np.abs(vote, out=vote)
        least = np.multiply(sizes, kind.type(_TIE), out=vote)
        is_up, is_down = total > least, total < -least
        divisor = is_for * is_up + is_against * is_down
        sign = np.subtract(is_up, is_down, dtype=kind)
        merged: Floats = (
            (total * sign + sizes) * sign / 2
        )  # the votes of the elected sign: half of (sum of votes · sign + sum of sizes)
        merged /= divisor + (divisor == 0)
        return merged

    return merge_row_blocks(merge, deltas)
