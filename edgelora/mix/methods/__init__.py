"""Merge methods by name: what each works on, and its options.

A new method is one function and one line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora.mix.methods.arithmetic import least_rank_factors, linear, linear_factors
from edgelora.mix.methods.core import in_core_space
from edgelora.mix.methods.dare import dare_linear, dare_ties
from edgelora.mix.methods.iso import iso_c
from edgelora.mix.methods.knots import in_knots_space
from edgelora.mix.methods.magnitude import magnitude
from edgelora.mix.methods.ties import ties, ties_weighted
from edgelora.mix.methods.tsv import tsv

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgelora.mix.methods.deltas import Factors, Floats

DEFAULT_DENSITY = 0.2  # the share that TIES keeps (arXiv 2306.01708, section 5)
DENSITY, SEEDS = "density", "seeds"


@dataclass(frozen=True)
class Method:
    """A way to merge several weighted ΔW into one.

    It has at least one of dense and factored.
    summary: one line for --help and the docs.
    dense: a function from deltas (deltas.Rows, each (N, K)) and weights to ΔW (N, K).
    factored: a function from pairs A (r, K), B (N, r) and weights to one such pair, exactly. It is preferred where all deltas are
    products. reads: their keyword arguments: density, the share of entries to keep, and seeds, one per delta.
    """

    summary: str
    dense: Callable[..., Floats] | None = None
    factored: Callable[..., Factors] | None = None
    reads: tuple[str, ...] = ()

    @property
    def settings(self) -> tuple[str, ...]:
        """The user's settings: density, and the one seed that the deltas' seeds come from."""
        return tuple("seed" if name == SEEDS else name for name in self.reads)


MIX_METHODS: Mapping[str, Method] = {
    "linear": Method("weighted sum, exact at the summed rank", linear, linear_factors),
    "svd": Method("weighted sum at the least rank that holds it, or cut to --rank", linear, least_rank_factors),
    "ties": Method("trim, elect signs, mean of the agreeing by count", ties, reads=(DENSITY,)),
    "ties_weighted": Method(
        "ties with the mean by weight: only the ratio of the weights counts", ties_weighted, reads=(DENSITY,)
    ),
    "dare_linear": Method("drop entries at random, scale up, sum", dare_linear, reads=(DENSITY, SEEDS)),
    "dare_ties": Method("drop entries at random, scale up, elect signs, mean by count", dare_ties, reads=(DENSITY, SEEDS)),
    "magnitude": Method("keep the largest entries, sum", magnitude, reads=(DENSITY,)),
    "knots": Method("ties on the parts of one SVD of all deltas", factored=in_knots_space(ties), reads=(DENSITY,)),
    "core_ties": Method("ties in the adapters' common core space", factored=in_core_space(ties), reads=(DENSITY,)),
    "core_tsv": Method("directions made orthogonal across adapters, in core space", factored=in_core_space(tsv)),
    "core_iso": Method("weighted sum with a flat spectrum, in core space", factored=in_core_space(iso_c)),
    "tsv": Method("what core_tsv computes, by SVDs of whole deltas: slow", tsv),
    "iso_c": Method("what core_iso computes, by an SVD of the whole sum: slow", iso_c),
}
