"""Weights that several stored tensors encode, shown as plain float32 tensors under their plain names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgelora_export.base.tensors import Tensors


class Weight(Protocol):
    """A weight that several stored tensors encode.

    shape: (N, K), outputs first, as torch keeps it. parts: names of the stored tensors, the codes first.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    def read_rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Computes rows start to stop, float32 (stop - start, K)."""


@dataclass(frozen=True)
class DequantizedTensors:
    """The tensors of a quantized base as if they had been stored in float32. Satisfies Tensors.

    stored: the tensors as the file holds them. weights: the encoded ones by plain name. files: the file of each tensor, encoded
    or plain, by plain name.
    """

    stored: Tensors
    weights: Mapping[str, Weight]
    files: Mapping[str, str]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights[name].shape if name in self.weights else self.stored.shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(np.float32) if name in self.weights else self.stored.dtype(name)

    def read(self, name: str) -> NDArray[Any]:
        return self.read_rows(name, 0, self.shape(name)[0]) if name in self.weights else self.stored.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        if name not in self.weights:
            return self.stored.read_rows(name, start, stop)
        start, stop, _ = slice(start, stop).indices(self.shape(name)[0])
        with np.errstate(all="ignore"):  # a scale that is not finite shows in the values, which Base checks
            return self.weights[name].read_rows(start, max(start, stop))
