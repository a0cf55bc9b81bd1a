"""A mix: adapters with weights and a method, computed module by module on ΔW in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelora.adapters import check_same_base
from edgelora.methods import DEFAULT_DENSITY, linear, ties, truncate
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

    from numpy.typing import NDArray

    from edgelora.adapters import Adapter

    Floats = NDArray[np.float32]

METHODS = ("linear", "ties")


@dataclass(frozen=True)
class Mix:
    """Weighted adapters of one base. Satisfies edgelora_export's Delta and LowRank.

    density: the share of entries that ties keeps of each delta; linear has no use for it.
    """

    adapters: Mapping[str, Adapter]
    weights: Mapping[str, float]
    method: str = "linear"
    density: float = DEFAULT_DENSITY

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method {self.method!r} is not known; use one of {', '.join(METHODS)}")
        if unknown := sorted(set(self.weights) - set(self.adapters)):
            raise InputError(
                f"the mix names {', '.join(unknown)}, which is no adapter here; there are {', '.join(self.adapters)}"
            )
        if wrong := [f"{name} = {weight}" for name, weight in self.weights.items() if not math.isfinite(weight)]:
            raise InputError(f"weights must be finite numbers: {', '.join(wrong)}")
        if not 0 < self.density <= 1:
            raise InputError(f"density = {self.density}: use a share, more than 0 and at most 1")
        check_same_base({name: self.adapters[name] for name in self.weights})

    @property
    def modules(self) -> Set[str]:
        return {module for name in self.weights for module in self.adapters[name].modules}

    def rank(self, module: str) -> int:
        """The rank that holds a linear mix exactly: the sum of its adapters'."""
        return sum(adapter.shapes[module][2] for adapter, _ in self._parts(module))

    def dense(self, module: str, weight: Floats | None = None) -> Floats:
        """ΔW float32 (N, K) of the whole mix; weight is the base's, which some kinds of adapters need."""
        parts = self._parts(module)
        deltas, weights = [adapter.dense(module, weight) for adapter, _ in parts], [share for _, share in parts]
        if self.method == "ties":
            return ties(deltas, weights, density=self.density)
        return linear(deltas, weights)

    def factors(self, module: str) -> tuple[Floats, Floats]:
        """A float32 (r, K) and B float32 (N, r): exact for linear, else the best approximation of the summed rank."""
        a, b, _ = self.factors_with_error(module)
        return a, b

    def factors_with_error(self, module: str) -> tuple[Floats, Floats, float]:
        """As factors(), and the relative error of B·A."""
        if self.method != "linear":
            return truncate(self.dense(module), self.rank(module))
        pairs = [(adapter.factors(module), np.float32(weight)) for adapter, weight in self._parts(module)]
        return (
            np.concatenate([a for (a, _), _ in pairs]),
            np.concatenate([b * weight for (_, b), weight in pairs], axis=1),
            0.0,
        )

    def _parts(self, module: str) -> list[tuple[Adapter, float]]:
        """The adapters that change a module, with their weights. One that does not counts as zero there."""
        named = [(self.adapters[name], weight) for name, weight in self.weights.items()]
        return [(adapter, weight) for adapter, weight in named if module in adapter.modules]
