"""A mix: adapters with weights and a merge method.

ΔW is computed in float32, module by module.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.adapters.checks import check_same_base
from edgelora.adapters.names import EMBEDDING, HEAD
from edgelora.mix.methods import DEFAULT_DENSITY, DENSITY, MIX_METHODS, SEEDS
from edgelora.mix.methods.deltas import Product
from edgelora.mix.methods.magnitude import check_density
from edgelora.mix.methods.spectra import truncate, truncate_product
from edgelora.mix.weights import Weight as Weight  # re-exported
from edgelora.mix.weights import check_weight, describe_weight, idle_patterns, weight_at
from edgelora_export.plan.variants import Delta
from edgelora_runtime.errors import InputError, suggest_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Set

    from numpy.typing import NDArray

    from edgelora.adapters.folder import Adapter

    Floats = NDArray[np.float32]


_SUMS = ("linear", "svd")  # methods whose result is the weighted sum, as it is
_KEPT_BYTES = 256 << 20  # merged factors that a mix keeps, as an export goes over its modules several times


@dataclass(frozen=True)
class Mix(Delta):
    """Weighted adapters of one base. Satisfies edgelora_export's LowRank, too.

    weights: per adapter a number, or numbers by pattern of module names. An adapter with weight 0 in a module is left out there.
    method: a name in MIX_METHODS. density: the share of each delta's entries to keep. seed: for random draws. Methods that do
    not use density or seed ignore them.
    """

    adapters: Mapping[str, Adapter]
    weights: Mapping[str, Weight]
    method: str = "linear"
    density: float = DEFAULT_DENSITY
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in MIX_METHODS:
            near = suggest_name([self.method], MIX_METHODS)
            raise InputError(f"method {self.method!r} is not known; use one of {', '.join(MIX_METHODS)}{near}")
        if unknown := sorted(set(self.weights) - set(self.adapters)):
            raise InputError(
                f"the mix names {', '.join(unknown)}, which is not an adapter here; there are {', '.join(self.adapters)}"
                f"{suggest_name(unknown, self.adapters)}"
            )
        if wrong := [mistake for name, weight in self.weights.items() for mistake in check_weight(weight, name)]:
            raise InputError(f"weights of a mix: {'; '.join(wrong)}")
        for name, weight in self.weights.items():
            changed = self.adapters[name].modules | self.adapters[name].biased
            if idle := idle_patterns(weight, changed):
                example = min(changed)
                raise InputError(f"weights of {name}: no module matches {', '.join(idle)}; one of its modules is {example}")
        check_density(self.density)
        if self.seed < 0:
            raise InputError(f"seed = {self.seed}: use a whole number, 0 or more")
        check_same_base({name: self.adapters[name] for name in self.weights})
        self._check_biases()
        self._check_vocab()

    @cached_property
    def modules(self) -> Set[str]:
        """The modules that an adapter changes with a weight other than 0."""
        return {module for name in self.weights for module in self.adapters[name].modules if self.weight(name, module)}

    @cached_property
    def biased(self) -> Set[str]:
        """The modules to whose bias an adapter adds with a weight other than 0."""
        return {module for name in self.weights for module in self.adapters[name].biased if self.weight(name, module)}

    @cached_property
    def vocab_size(self) -> int | None:
        """Rows of the embedding and the head that its adapters bring, None for the base's own."""
        return next((size for size in self._vocab_sizes().values()), None)

    @cached_property
    def ties_vocab(self) -> bool:
        """True if its change of the embedding is the head's too, on a base that ties them."""
        return any(self.adapters[name].ties_vocab for name in self._vocab_names())

    def weight(self, name: str, module: str) -> float:
        """An adapter's weight in a module."""
        return weight_at(self.weights[name], module)

    def options(self) -> dict[str, float]:
        """The settings that the method uses, by name: density, seed."""
        settings = {DENSITY: self.density, "seed": self.seed}
        return {name: settings[name] for name in MIX_METHODS[self.method].settings}

    def describe(self) -> str:
        """A one-line description, such as "ties(0.7 sql + 0.5 medical, density 0.2)"."""
        terms = " + ".join(describe_weight(weight, name) for name, weight in self.weights.items())
        return f"{self.method}({', '.join([terms, *(f'{name} {value:g}' for name, value in self.options().items())])})"

    def rank(self, module: str) -> int:
        """Sums the ranks of the adapters that take part in a module.

        Methods on factors are exact at this rank.
        """
        return sum(self.adapters[name].shapes[module][2] for name in self._names(module))

    def dense(self, module: str, weight: Floats | None = None) -> Floats:
        """Returns ΔW of the mix, float32 (N, K).

        weight: the base's, which some kinds of adapters need.
        """
        names, method = self._names(module), MIX_METHODS[self.method]
        reasons = {name: self.adapters[name].why_not_low_rank(module) for name in names}
        if method.factored is not None and not any(reasons.values()):
            a, b = self._merge_factors(module, names)
            return b @ a
        if method.dense is None:
            wrong = ", ".join(f"{name} is {reason}" for name, reason in reasons.items() if reason)
            usable = ", ".join(name for name, other in MIX_METHODS.items() if other.dense is not None)
            raise InputError(f"{module}: {self.method} works on factors, but {wrong}; use one of {usable}")
        deltas: list[Product | Floats] = []
        for name, reason in reasons.items():
            adapter = self.adapters[name]
            deltas.append(adapter.dense(module, weight) if reason else Product(*adapter.factors(module)))
        return method.dense(deltas, self._weights(module, names), **self._arguments(module, names))

    def bias(self, module: str, base_bias: Floats | None) -> Floats:
        """Returns the weighted sum of the adapters' Δb, float32 (N,), for a module in `biased`.

        base_bias: the base's own (N,), None if it has none.
        """
        names = [name for name in sorted(self.weights) if module in self.adapters[name].biased and self.weight(name, module)]
        parts = [self.adapters[name].bias(module, base_bias) * np.float32(self.weight(name, module)) for name in names]
        total: Floats = np.sum(parts, axis=0, dtype=np.float32)
        return total

    def factors(self, module: str) -> tuple[Floats, Floats]:
        """Returns A, float32 (r, K), and B, float32 (N, r).

        They are exact for methods on factors, else the nearest of the summed rank.
        """
        a, b, _ = self.factors_with_error(module)
        return a, b

    def factors_with_error(self, module: str, rank: int | None = None) -> tuple[Floats, Floats, float]:
        """Returns factors() with the relative error ‖ΔW - B·A‖ / ‖ΔW‖.

        rank: truncate to the nearest product of this rank. Raises InputError for adapters that are not products of two factors.
        """
        if rank is not None and rank < 1:
            raise InputError(f"rank = {rank}: use 1 or more")
        names = self._names(module)
        if MIX_METHODS[self.method].factored is not None:
            a, b = self._merge_factors(module, names)
            return (a, b, 0.0) if rank is None or len(a) <= rank else truncate_product(a, b, rank)
        return truncate(self.dense(module), rank or self.rank(module))

    def _check_biases(self) -> None:
        """Raises InputError for biases in a mix that is no sum. A merge method has no meaning for one vector."""
        if self.method not in _SUMS and len(self.weights) > 1 and self.biased:
            owners = [name for name in self.weights if not self.biased.isdisjoint(self.adapters[name].biased)]
            raise InputError(
                f"{', '.join(owners)} adds to biases, which mix by sums alone; use method {' or '.join(_SUMS)} "
                f"instead of {self.method}"
            )

    def _check_vocab(self) -> None:
        """Raises InputError for adapters of vocabularies of different sizes, or that tie head and embedding in part."""
        sizes = self._vocab_sizes()
        if len(set(sizes.values())) > 1:
            shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InputError(f"adapters of different vocabularies do not mix: rows of the embedding are {shown}")
        ties = {name: self.adapters[name].ties_vocab for name in self._vocab_names()}
        if len(set(ties.values())) > 1:
            raise InputError(
                f"{', '.join(name for name, tied in ties.items() if tied)} trained embedding and head as one, "
                f"{', '.join(name for name, tied in ties.items() if not tied)} apart; such adapters do not mix"
            )

    def _vocab_names(self) -> list[str]:
        """Lists the adapters that change the embedding or the head with a weight other than 0."""
        return [
            name
            for name in self.weights
            if any(module in self.adapters[name].modules and self.weight(name, module) for module in (EMBEDDING, HEAD))
        ]

    def _vocab_sizes(self) -> dict[str, int]:
        sizes = {name: self.adapters[name].vocab_size for name in self._vocab_names()}
        return {name: size for name, size in sizes.items() if size is not None}

    def _names(self, module: str) -> list[str]:
        """Lists the adapters that change a module with a weight other than 0.

        They are sorted, so that their order does not affect rounding.
        """
        return [name for name in sorted(self.weights) if module in self.adapters[name].modules and self.weight(name, module)]

    def _weights(self, module: str, names: Sequence[str]) -> list[float]:
        return [self.weight(name, module) for name in names]

    def _merge_factors(self, module: str, names: Sequence[str]) -> tuple[Floats, Floats]:
        if module in self._kept:
            return self._kept[module]
        merge = MIX_METHODS[self.method].factored
        assert merge is not None
        factors = [self.adapters[name].factors(module) for name in names]
        merged = merge(factors, self._weights(module, names), **self._arguments(module, names))
        if self.method != "linear" and self._kept_bytes + sum(part.nbytes for part in merged) <= _KEPT_BYTES:
            self._kept[module] = merged
        return merged

    @cached_property
    def _kept(self) -> dict[str, tuple[Floats, Floats]]:
        """Merged factors by module, of methods that decompose matrices to find them."""
        return {}

    @property
    def _kept_bytes(self) -> int:
        return sum(part.nbytes for factors in self._kept.values() for part in factors)

    def _arguments(self, module: str, names: Sequence[str]) -> dict[str, Any]:
        values = {DENSITY: self.density, SEEDS: [draw_seed(self.seed, module, name) for name in names]}
        return {name: values[name] for name in MIX_METHODS[self.method].reads}


def draw_seed(seed: int, module: str, name: str) -> int:
    """Draws the seed for an adapter's draws in a module.

    It does not depend on other adapters or modules.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}\0{module}\0{name}".encode()).digest()[:8], "little")
