"""TIES: trim, elect a sign per entry, average what agrees with it (arXiv 2306.01708, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelora.mix.methods.deltas import by_runs
from edgelora.mix.methods.magnitude import trim_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora.mix.methods.deltas import Floats, Rows

_TIE = 1e-6  # a vote whose margin is this small a share of all votes is decided by rounding: it elects nothing


def ties(deltas: Sequence[Rows], weights: Sequence[float], *, density: float) -> Floats:
    """TIES with weights: the sum of the agreeing weighted entries over their count.

    Each Δ keeps its largest `density` share and is then weighted; the sign is that of the weighted sum. A delta of negative
    weight votes with its signs turned, and is subtracted where it agrees. The paper has no weights and scales its result by
    one λ, which is one weight for all here. PEFT trims and divides as here, but elects on unweighted deltas (merge_utils.py
    of 0.21), so that a delta of small weight can outvote the rest; mergekit elects as here and divides as ties_weighted.
    """
    return elect(trim_all(deltas, density), weights)


def ties_weighted(deltas: Sequence[Rows], weights: Sequence[float], *, density: float) -> Floats:
    """TIES whose sum of the agreeing weighted entries is divided by the sum of their weights, which takes the scale out.

    mergekit's convention with normalize, its default for ties
    (https://github.com/arcee-ai/mergekit/blob/0031a40ae4692ee2da83448668048a51bf8bbf4b/mergekit/merge_methods/generalized_task_arithmetic.py),
    but for negative weights: they count by their size here, where mergekit's sum may be 0 or turn the sign.
    """
    return elect(trim_all(deltas, density), weights, [abs(weight) for weight in weights])


def elect(deltas: Sequence[Rows], weights: Sequence[float], shares: Sequence[float] | None = None) -> Floats:
    """Per entry the sum of the weighted deltas of the elected sign, over their count, or over the sum of their shares."""

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
        merged: Floats = (total * sign + sizes) * sign / 2  # those of one sign: half of all votes' sum and all sizes' sum
        merged /= divisor + (divisor == 0)
        return merged

    return by_runs(merge, deltas)
