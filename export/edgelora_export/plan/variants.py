"""What the exporter is asked to build. Where a delta comes from (which adapters, which method) is not its concern."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, Protocol

from edgelora_export.plan.calibration import Calibration
from edgelora_export.quantize.int4 import Grid, check_grid
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Set

    import numpy as np
    from numpy.typing import NDArray

    from edgelora_runtime.bundle.manifest import RouterEntry

    Floats = NDArray[np.float32]

QUANTIZATION_METHODS = ("gptq", "auto-round", "rtn", "none")
MERGE_BASES = ("auto", "float", "trained")


class Delta(Protocol):
    """A change to a base's weights, computed module by module; it may depend on them."""

    @property
    def modules(self) -> Set[str]:
        """Names of the linear layers and embeddings that it changes, as in the checkpoint, without '.weight'."""

    def dense(self, module: str, weight: Floats) -> Floats:
        """ΔW of one module, float32 (N, K), for the base's own weight, float32 (N, K)."""


class LowRank(Protocol):
    """A change whose every ΔW is B·A."""

    @property
    def modules(self) -> Set[str]: ...

    def factors(self, module: str) -> tuple[Floats, Floats]:
        """A float32 (r, K) and B float32 (N, r), all scaling folded in."""


@dataclass(frozen=True)
class Quantization:
    """How a bundle's weights are stored.

    bits: 4 or 8, or 32 for unquantized float32. block_size: weights that share a scale. symmetric: without zero points.
    method: gptq (codes that make up for each other's errors on calibration inputs), auto-round (4-bit rounding and clipping
    learned on them, by the package of that name; embedding and head by gptq), rtn (rounding to nearest, the step of
    each block chosen by squared error), or none, which goes with 32 bits. int8: patterns (fnmatch) of the products that get
    8 bits whatever the rest has: layers.0.*, *.mlp.down, embedding, head.
    """

    bits: int = 4
    block_size: int = 32
    symmetric: bool = True
    method: str = "gptq"
    int8: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in QUANTIZATION_METHODS:
            raise InputError(f"quantization method {self.method!r}: use one of {', '.join(QUANTIZATION_METHODS)}")
        if self.bits == 32 or self.method == "none":
            object.__setattr__(self, "bits", 32)
            object.__setattr__(self, "method", "none")
            return
        check_grid(self.bits, self.block_size)
        if self.method == "auto-round" and self.bits != 4:
            raise InputError(f"quantization method 'auto-round' has 4 bits, not {self.bits}; use gptq or rtn")

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at what a model makes of calibration data."""
        return self.method in ("gptq", "auto-round")

    def grid(self, product: str) -> Grid | None:
        """The grid of a product, the embedding or the head; None for float32."""
        if self.bits == 32:
            return None
        raised = any(fnmatchcase(product, pattern) for pattern in self.int8)
        return Grid(8 if raised else self.bits, self.block_size, self.symmetric)

    def idle_patterns(self, products: Iterable[str]) -> list[str]:
        """Patterns of int8 that mean no product."""
        products = list(products)
        return [pattern for pattern in self.int8 if not any(fnmatchcase(product, pattern) for product in products)]

    def raise_to_int8(self, products: Iterable[str]) -> Quantization:
        """The same with more products in 8 bits."""
        return replace(self, int8=(*self.int8, *products))


@dataclass(frozen=True)
class TrainedBase:
    """The base as a mix's adapters saw it in training, with the mix on it: both as changes of the float base.

    quantization: how training held its weights. merged: the change of the mix's own modules alone. unmerged: that of every
    weight that training held in 4 bits.
    """

    quantization: Literal["nf4", "int4"]
    merged: Delta
    unmerged: Delta


@dataclass(frozen=True)
class Variant:
    """One variant to build: live if it has live weights, else merged.

    mix and method are recorded in the manifest, as are weights, density and seed: see its VariantEntry. delta: what the mix
    adds to the float base, None for the bare base.
    live: weight per live adapter of the bundle, or None for a merged variant.
    calibration: what its weights are quantized on, and what it is judged on.
    trained: the base that its adapters were trained on, None where that is the float one or not known.
    merge_base: what a merged variant is merged into: float, trained, or auto for the better of the two; see
    choose_merge_base. merge_losses: held-out loss by base, in nats per token, where the two were compared.
    """

    name: str
    mix: Mapping[str, float] = field(default_factory=dict)
    method: str = "linear"
    delta: Delta | None = None
    live: Mapping[str, float] | None = None
    calibration: Calibration = field(default_factory=Calibration)
    trained: TrainedBase | None = None
    merge_base: str = "float"
    merge_losses: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    density: float | None = None
    seed: int | None = None

    @property
    def change(self) -> Delta | None:
        """What its weights have in place of the float base's, whichever base it is merged into."""
        return self.trained.merged if self.trained is not None and self.merge_base == "trained" else self.delta


@dataclass(frozen=True)
class PackedRouter:
    """A router to put into a bundle: what the manifest says of it, and the bytes of its file."""

    entry: RouterEntry
    content: bytes
