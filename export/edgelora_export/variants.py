"""What the exporter is asked to build. Where a delta comes from (which adapters, which method) is not its concern."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from edgelora_export.int4 import check_grid
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


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
    method: rtn (rounding to nearest, the step of each block chosen by squared error), or none, which goes with 32 bits.
    """

    bits: int = 4
    block_size: int = 32
    symmetric: bool = True
    method: str = "rtn"

    def __post_init__(self) -> None:
        if self.bits == 32:
            if self.method != "none":
                object.__setattr__(self, "method", "none")
            return
        check_grid(self.bits, self.block_size)
        if self.method != "rtn":
            raise InputError(f"quantization method {self.method!r}: use rtn, or bits = 32 for no quantization")


@dataclass(frozen=True)
class Variant:
    """One variant to build: merged if it has a delta or no live weights, live if it has some.

    mix and method are recorded in the manifest; delta and live say what is done.
    live: weight per live adapter of the bundle, or None for a merged variant.
    """

    name: str
    mix: Mapping[str, float] = field(default_factory=dict)
    method: str = "linear"
    delta: Delta | None = None
    live: Mapping[str, float] | None = None
