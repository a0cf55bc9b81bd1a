"""Computes a mergekit merge of LoRA adapters on ΔW, module by module.

The results are mergekit's on whole float32 models. The formulas are those of mergekit's linear.py, generalized_task_arithmetic.py
and sparsify.py at https://github.com/arcee-ai/mergekit/tree/a6e402884ba9bc30da7f23e8304a35f19485de95/mergekit. Only DARE's random
draws differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edgelora.adapters.checks import check_same_base
from edgelora.adapters.folder import open_adapters
from edgelora.adapters.gguf_file import is_gguf
from edgelora.mix.methods.dare import drop
from edgelora.mix.methods.deltas import Product, TransformedDelta, merge_row_blocks, row_blocks
from edgelora.mix.methods.magnitude import trim
from edgelora.mix.methods.spectra import stack_factors, truncate, truncate_product
from edgelora.mix.mix import draw_seed
from edgelora_export.base.base import Base
from edgelora_export.plan.variants import Delta
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence, Set

    from numpy.typing import NDArray

    from edgelora.adapters.folder import Adapter
    from edgelora.composing.mergekit_config import MergekitConfig, MergeSource
    from edgelora.mix.methods.deltas import Rows

    Floats = NDArray[np.float32]

_TINY = 1e-7  # mergekit does not rescale if a sum of magnitudes is below this
_SUM_METHODS = ("linear", "task_arithmetic")


@dataclass(frozen=True)
class Scaled(TransformedDelta):
    """A delta times a factor."""

    factor: float

    def __getitem__(self, rows: slice) -> Floats:
        scaled: Floats = self.delta[rows] * np.float32(self.factor)
        return scaled


@dataclass(frozen=True)
class MergekitMix(Delta):
    """The mix that a configuration describes, with its adapters opened and named.

    sources: by adapter name. Entries of the bare base stay in the configuration. seed: for
    DARE's draws.
    """

    config: MergekitConfig
    sources: Mapping[str, MergeSource]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def open(cls, config: MergekitConfig, seed: int = 0) -> MergekitMix:
        """Opens the adapters. Raises InputError for adapters that cannot be mixed."""
        named: dict[str, MergeSource] = {}
        for source in config.sources:
            if source.adapter is not None:
                name = source.adapter.name
                while name in named:
                    name += "'"
                named[name] = source
        folders = {name: source.adapter for name, source in named.items() if source.adapter is not None}
        base = Base.find(config.base).config if any(map(is_gguf, folders.values())) else None
        adapters = open_adapters(dict(folders), base=base)
        check_same_base(adapters)
        return cls(config, named, adapters, seed)

    @property
    def modules(self) -> Set[str]:
        return {module for adapter in self.adapters.values() for module in adapter.modules}

    def describe(self) -> str:
        """A one-line description of the merge."""
        return f"mergekit {self.config.method}({', '.join(self.adapters)})"

    def rank(self, module: str) -> int:
        """The summed rank of the adapters of a module."""
        return sum(adapter.shapes[module][2] for adapter in self._present(module).values())

    def dense(self, module: str, weight: Floats | None = None) -> Floats:
        """Returns ΔW, float32 (N, K).

        weight: the base's, which some kinds of adapters need.
        """
        deltas: dict[str, Rows] = {
            name: adapter.dense(module, weight) if adapter.why_not_low_rank(module) else Product(*adapter.factors(module))
            for name, adapter in self._present(module).items()
        }
        weights = self._weights(module)
        if self.config.method in _SUM_METHODS:
            parts, shares = [*deltas.values()], [self._shares(module)[name] for name in deltas]
            return merge_row_blocks(lambda rows: _sum(rows, shares), parts)
        sparse = [self._sparsify(module, name, delta) for name, delta in deltas.items()]
        factor = self.config.shared("lambda", module, 1.0)
        normalize = self._normalizes(module)
        if self.config.method == "dare_linear":
            total = sum(weights.values())
            factor /= total if normalize and abs(total) >= 1e-8 else 1.0
            return merge_row_blocks(lambda rows: _sum(rows, [weights[name] * factor for name in deltas]), sparse)
        return merge_row_blocks(
            lambda rows: _elect(rows, [weights[name] for name in deltas], factor, normalize=normalize), sparse
        )

    def factors_with_error(self, module: str, rank: int | None = None) -> tuple[Floats, Floats, float]:
        """Returns A, float32 (r, K), B, float32 (N, r), and the relative error of B·A.

        The error is 0 for sums, else that of the summed rank.
        """
        if rank is not None and rank < 1:
            raise InputError(f"rank = {rank}: use 1 or more")
        if self.config.method in _SUM_METHODS:
            shares = self._shares(module)
            factors = {name: adapter.factors(module) for name, adapter in self._present(module).items()}
            a, b = stack_factors([(a, b * np.float32(shares[name])) for name, (a, b) in factors.items()])
            return (a, b, 0.0) if rank is None or len(a) <= rank else truncate_product(a, b, rank)
        return truncate(self.dense(module), rank or self.rank(module))

    def _present(self, module: str) -> dict[str, Adapter]:
        return {name: adapter for name, adapter in self.adapters.items() if module in adapter.modules}

    def _normalizes(self, module: str) -> bool:
        return bool(self.config.shared("normalize", module, float(self.config.method in ("linear", "ties"))))

    def _weights(self, module: str) -> dict[str, float]:
        """Returns each adapter's weight in a module.

        Adapters without the module count too: for mergekit their ΔW is 0.
        """
        return {name: self._weight(source, name, module) for name, source in self.sources.items()}

    def _weight(self, source: MergeSource, name: str, module: str) -> float:
        weight = self.config.own(source, "weight", module)
        if weight is None:
            raise InputError(
                f"mergekit configuration: {name} has no weight for {module}; set parameters.weight for it or for all"
            )
        if not math.isfinite(weight):
            raise InputError(f"mergekit configuration: the weight of {name} for {module} is {weight}; use a finite number")
        return weight

    def _shares(self, module: str) -> dict[str, float]:
        """The factor on each adapter's ΔW, for methods that are sums."""
        weights, normalize = self._weights(module), self._normalizes(module)
        if self.config.method == "task_arithmetic":
            factor, total = self.config.shared("lambda", module, 1.0), sum(weights.values())
            factor /= total if normalize and abs(total) >= 1e-8 else 1.0
            return {name: weight * factor for name, weight in weights.items()}
        rest = sum(self._weight(source, "the base", module) for source in self.config.sources if source.adapter is None)
        total = sum(weights.values()) + rest
        if not normalize and abs(total - 1) > 1e-6:
            raise InputError(
                f"mergekit configuration: linear with normalize: false and weights that sum to {total:g} in {module} would scale "
                "the base itself, which an adapter cannot do; make them sum to 1, or use task_arithmetic"
            )
        if abs(total) < 1e-8:
            raise InputError(
                f"mergekit configuration: the weights of linear sum to 0 in {module}, and mergekit divides by their sum"
            )
        return {name: weight / (total if normalize else 1.0) for name, weight in weights.items()}

    def _sparsify(self, module: str, name: str, delta: Rows) -> Rows:
        density = self.config.own(self.sources[name], "density", module)
        size = math.prod(delta.shape)
        if density is None or density >= 1:
            return delta
        kept = int(density * size)
        if kept < 1 or density <= 0:
            raise InputError(
                f"mergekit configuration: density {density:g} keeps nothing of {name} in {module}; use a larger share"
            )
        if self.config.method == "ties":
            # trim() keeps ceil(density · N · K) entries, and mergekit keeps int(density · N · K).
            sparse: Rows = trim(delta, (kept - 0.5) / size)
        else:
            dropped = drop(delta, density, draw_seed(self.seed, module, name))
            sparse = Scaled(dropped, dropped.probability)  # undoes drop()'s rescaling
        rescale = self.config.shared("rescale", module, float(self.config.method != "ties"))
        if not rescale:
            return sparse
        before, after = _sum_magnitudes(delta), _sum_magnitudes(sparse)
        return Scaled(sparse, before / after) if min(before, after) >= _TINY else sparse


def _sum_magnitudes(delta: Rows) -> float:
    return sum(float(np.abs(delta[rows]).sum(dtype=np.float64)) for rows in row_blocks(delta.shape))


def _sum(parts: Sequence[Floats], weights: Sequence[float]) -> Floats:
    total: Floats = np.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        total += part * np.float32(weight)
    return total


def _elect(parts: Sequence[Floats], weights: Sequence[float], factor: float, *, normalize: bool) -> Floats:
    """Divides the sum of the weighted entries with the elected sign by their weights.

    The sign is + where votes cancel.
    """
    votes = np.stack([part * np.float32(weight) for part, weight in zip(parts, weights, strict=True)])
    agrees = np.where(votes.sum(axis=0) >= 0, votes > 0, votes < 0)
    total: Floats = np.where(agrees, votes, np.float32(0)).sum(axis=0)
    if normalize:
        divisor = np.tensordot(np.array(weights, np.float32), agrees.astype(np.float32), axes=1)
        total /= np.where(divisor == 0, np.float32(1), divisor)
    return total * np.float32(factor)
