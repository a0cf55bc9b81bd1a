"""The variants and the quantization that the exporter is asked for, whatever adapters and methods a delta comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    """A change to a base's weights, computed module by module. It may depend on the weights.

    A class that derives from it changes no biases and keeps the base's vocabulary, unless it says otherwise.
    """

    @property
    def modules(self) -> Set[str]:
        """Names of the linear layers and embeddings that it changes, as in the checkpoint, without '.weight'."""

    def dense(self, module: str, weight: Floats) -> Floats:
        """Computes ΔW of one module, float32 (N, K), for the base's own weight, float32 (N, K).

        With a vocab_size, the weight of the embedding or the head comes with that many rows: new ones are 0, surplus ones are
        cut.
        """

    @property
    def biased(self) -> Set[str]:
        """Names of the linear layers to whose bias it adds."""
        return frozenset()

    def bias(self, module: str, base_bias: Floats | None) -> Floats:
        """Computes Δb of one module of `biased`, float32 (N,). base_bias: the base's, or None if it has none there."""
        raise KeyError(module, base_bias)

    @property
    def vocab_size(self) -> int | None:
        """The rows that it gives the embedding and the head. None keeps the base's."""
        return None

    @property
    def ties_vocab(self) -> bool:
        """True if its change of the embedding is the head's too, in a base that ties the two.

        False if it was trained with the two apart. A base that ties nothing does not ask.
        """
        return False


class LowRank(Protocol):
    """A change whose every ΔW is B·A."""

    @property
    def modules(self) -> Set[str]: ...

    def factors(self, module: str) -> tuple[Floats, Floats]:
        """Returns A float32 (r, K) and B float32 (N, r), with all scaling folded in."""


@dataclass(frozen=True)
class Quantization:
    """The storage of a bundle's weights.

    bits: 4 or 8, or 32 for unquantized float32. block_size: weights that share a scale.
    symmetric: True if there are no zero points.
    method: gptq (codes compensate for each other's errors on calibration inputs), auto-round (4-bit rounding and clipping learned
    on the same inputs by the package of that name, with embedding and head by gptq), rtn (rounding to nearest, with the step of
    each block chosen by squared error), or none, which implies 32 bits.
    int8: patterns (fnmatch) of the products that get 8 bits: layers.0.*, *.mlp.down, embedding, head.

    >>> quantization = Quantization(int8=("*.mlp.down",))
    >>> [quantization.grid(f"layers.0.{name}").bits for name in ("mlp.down", "attention.qkv")]
    [8, 4]
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
            raise InputError(f"quantization method 'auto-round' needs 4 bits, not {self.bits}; use gptq or rtn")

    @property
    def calibrated(self) -> bool:
        """True if the method uses calibration samples."""
        return self.method in ("gptq", "auto-round")

    def grid(self, product: str) -> Grid | None:
        """Returns the grid of a product, the embedding or the head, or None for float32."""
        if self.bits == 32:
            return None
        raised = any(fnmatchcase(product, pattern) for pattern in self.int8)
        return Grid(8 if raised else self.bits, self.block_size, self.symmetric)

    def idle_patterns(self, products: Iterable[str]) -> list[str]:
        """Lists the patterns of int8 that match no product."""
        products = list(products)
        return [pattern for pattern in self.int8 if not any(fnmatchcase(product, pattern) for product in products)]


@dataclass(frozen=True)
class TrainedBase:
    """The base on which a mix's adapters were trained, with the mix added. Both deltas are relative to the float base.

    quantization: of the base during training. merged: changes only the mix's own modules. unmerged: changes every weight that
    training held in 4 bits.
    """

    quantization: Literal["nf4", "int4"]
    merged: Delta
    unmerged: Delta


@dataclass(frozen=True)
class Merge:
    """A delta to add to the float base, and the calibration on which the sum is quantized. delta: None for the bare base."""

    delta: Delta | None
    calibration: Calibration


@dataclass(frozen=True)
class Variant:
    """One variant to build: live if it has live weights, else merged.

    mix and method are recorded in the manifest, as are weights, density and seed. See VariantEntry. delta: the sum that the mix
    adds to the float base, None for the bare base.
    live: weight per live adapter of the bundle, or None for a merged variant.
    calibration: the samples on which its weights are quantized, and on which it is judged.
    trained: the base on which its adapters were trained, None if that is the float one or unknown.
    merge_base: the base of a merged variant: float, trained, or auto for the better of the two. See choose_merge_base.
    merge_losses: held-out loss by base, in nats per token, if the two were compared.
    kept: the weights that merge-aware training computed with, all on the default grid, as a change of the float base. A merged
    variant then rounds as training did, without calibration, and is judged against them. None for any other variant.
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
    kept: Delta | None = None

    @property
    def keeps_codes(self) -> bool:
        """True if the variant's weights are rounded exactly as merge-aware training rounded them."""
        return self.kept is not None and self.live is None

    @property
    def reference(self) -> Delta | None:
        """The change of the float base whose outputs the variant should have."""
        return self.kept if self.keeps_codes else self.delta

    @property
    def change(self) -> Delta | None:
        """The change of its weights relative to the float base's, whichever base it is merged into."""
        return self.trained.merged if self.trained is not None and self.merge_base == "trained" else self.delta

    @property
    def merge(self) -> Merge:
        """The change to the float base's weights, and the calibration of the variant."""
        return Merge(self.change, self.calibration)


@dataclass(frozen=True)
class PackedRouter:
    """A router for a bundle: its entry in the manifest, and the bytes of its file."""

    entry: RouterEntry
    content: bytes
