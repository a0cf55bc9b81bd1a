"""RegMean: merges adapters by least squares on their inputs.

The mix acts on each adapter's inputs as that adapter does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelora_export.plan.calibration import Moments
from edgelora_export.stream.layer_stream import LayerStream, embed, read_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgelora.adapters.folder import Adapter
    from edgelora.mix.methods.deltas import Factors
    from edgelora_export.base.base import Base
    from edgelora_export.decoder.description import Decoder, Part
    from edgelora_export.plan.calibration import Sample

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

RIDGE = 1e-2  # share of G_t's mean diagonal to add to it: in directions without samples, the mix is the mean of the adapters


def solve_regmean(
    base: Base,
    decoder: Decoder,
    adapters: Mapping[str, Adapter],
    samples: Mapping[str, Sequence[Sample]],
    on_layer: Callable[[int], None] = lambda index: None,
) -> dict[str, dict[str, Factors]]:
    """Solves RegMean for factors A (r, K), B (N, r) by module and adapter.

    Their plain sum over the adapters is the mix.
    Let X (T, K) be the inputs of a product on the samples of adapter t, with only t on the base, and G_t = XᵀX / T. Then
    ΔW = (Σ Δ_t G_t) (Σ G_t)⁻¹ is the least-squares fit to every adapter on its own inputs (arXiv 2212.09849, equation 2). B stays
    the same and A becomes A_t G_t (Σ G)⁻¹, so the rank is the sum of the ranks. Streams the base: memory holds one layer, the
    samples' hidden states, and G per adapter for each product of that layer.
    """
    stream = LayerStream(decoder)
    hidden = {name: embed(base, decoder, samples[name], adapters[name]) for name in adapters}
    solved: dict[str, dict[str, Factors]] = {}
    for index, layer in enumerate(decoder.layers):
        on_layer(index)
        moments = {name: {linear.name: Moments(linear.columns) for linear in layer.linears} for name in adapters}
        for name, adapter in adapters.items():
            weights = read_layer(base, decoder, index, adapter)
            taps = {product: sums.add for product, sums in moments[name].items()}
            hidden[name] = stream.run(index, weights, hidden[name], taps)
        counts = {name: sum(len(states) for states in hidden[name]) for name in adapters}
        for linear in layer.linears:
            sums = {name: moments[name].pop(linear.name).total() / np.float32(counts[name]) for name in adapters}
            solved |= {part.module: _solve_module(part, adapters, sums) for part in linear.parts if _is_changed(part, adapters)}
    return solved


def _solve_module(part: Part, adapters: Mapping[str, Adapter], sums: Mapping[str, Floats]) -> dict[str, Factors]:
    """Solves the factors of one module.

    sums: G (K, K) of its product on each adapter's samples.
    """
    places = _columns(part)
    own = {name: moments[np.ix_(places, places)].astype(np.float64) for name, moments in sums.items()}
    for matrix in own.values():
        matrix[np.diag_indices_from(matrix)] += RIDGE * np.trace(matrix) / len(matrix)
    total: Doubles = np.sum(list(own.values()), axis=0)
    factors = {}
    for name, adapter in adapters.items():
        if part.module in adapter.modules:
            a, b = adapter.factors(part.module)
            factors[name] = np.linalg.solve(total, own[name] @ a.T.astype(np.float64)).T.astype(np.float32), b
    return factors


def _columns(part: Part) -> NDArray[np.intp]:
    """Finds a module's checkpoint inputs among the inputs of its product: positions (K,)."""
    if part.columns is None:
        return np.arange(part.in_features)
    # Number the inputs from 1, so that padding of heads is 0; float32 holds these numbers exactly.
    numbered = part.columns.apply(np.arange(1, part.in_features + 1, dtype=np.float32), axis=0)
    return np.argsort(numbered, kind="stable")[-part.in_features :]


def _is_changed(part: Part, adapters: Mapping[str, Adapter]) -> bool:
    return any(part.module in adapter.modules for adapter in adapters.values())
