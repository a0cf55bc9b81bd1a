"""The tensors of a base, as every kind of file gives them: one at a time, never the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray


class Tensors(Protocol):
    """The tensors of a base, by the names that transformers gives them.

    files: the file that a checkpoint holds each tensor in, by the tensor's name.
    """

    @property
    def files(self) -> Mapping[str, str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""

    def dtype(self, name: str) -> np.dtype[Any]:
        """Returns the type that read() gives a tensor, without reading it."""

    def read(self, name: str) -> NDArray[Any]:
        """Reads a tensor in its own type if that is a plain one, or in float32 if the file holds codes."""

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Reads some rows of a matrix, as read(), without reading the others."""


@dataclass(frozen=True)
class RenamedTensors:
    """Some of another base's tensors, under other names. Satisfies Tensors.

    sources: the name that the other base has for each tensor.
    """

    tensors: Tensors
    sources: Mapping[str, str]

    @cached_property
    def files(self) -> Mapping[str, str]:
        return {name: self.tensors.files[source] for name, source in self.sources.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(self.sources[name])

    def dtype(self, name: str) -> np.dtype[Any]:
        return self.tensors.dtype(self.sources[name])

    def read(self, name: str) -> NDArray[Any]:
        return self.tensors.read(self.sources[name])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self.tensors.read_rows(self.sources[name], start, stop)
