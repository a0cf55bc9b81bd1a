"""The weights of gpu graphs: the codes of the cpu graphs, and fp16 copies of their float32 tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.weights.blobs import StoredTensor, read_stored, write_blob
from edgelora_export.weights.stored import StoredWeights
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Set
    from pathlib import Path

    from numpy.typing import NDArray

_LIMIT = float(np.finfo(np.float16).max)


def to_fp16(values: NDArray[np.float32], owner: str, advice: str) -> NDArray[np.float16]:
    """Converts values to fp16. Those too small for fp16 round towards 0.

    Raises InputError, with the owner and the advice, for a value outside the range of fp16.
    """
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= _LIMIT:
        raise InputError(f"{owner} reaches {largest:g}, which fp16 cannot hold; {advice}")
    return np.ascontiguousarray(values, np.float16)


class Fp16Copies:
    """The fp16 copies of float32 tensors in a folder's blobs. Each tensor is converted once, however many variants use it.

    wide: initializers that gpu graphs read in float32, from the same blob as cpu graphs.
    """

    def __init__(self, folder: Path, wide: Set[str]) -> None:
        self._folder = folder
        self._wide = wide
        self._copies: dict[StoredTensor, StoredTensor] = {}

    def copy(self, weights: StoredWeights) -> StoredWeights:
        """Returns the same weights for a gpu graph.

        Requires: the weights lie in the folder.
        Ensures: the result has the same names and grids. Its float32 tensors, except those of `wide`, are fp16.

        The copies of one blob's tensors form one blob, so that variants share copies as they share the originals.
        """
        groups: dict[str, dict[str, StoredTensor]] = {}
        for name, stored in weights.tensors.items():
            if stored.dtype == np.float32 and name not in self._wide:
                groups.setdefault(stored.location, {})[name] = stored
        tensors = dict(weights.tensors)
        for group in groups.values():
            tensors.update(self._store(group))
        return StoredWeights(tensors, weights.grids)

    def _store(self, group: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        known = {name: copy for name, stored in group.items() if (copy := self._copies.get(stored)) and self._exists(copy)}
        if len(known) == len(group):
            return known
        copies = write_blob(self._folder, {name: self._read(name, stored) for name, stored in group.items()})
        self._copies.update((stored, copies[name]) for name, stored in group.items())
        return copies

    def _exists(self, copy: StoredTensor) -> bool:
        """True if the copy's blob still exists. Blobs that no variant uses are removed."""
        return (self._folder / copy.location).exists()

    def _read(self, name: str, stored: StoredTensor) -> NDArray[Any]:
        return to_fp16(read_stored(self._folder, stored), name, 'leave "gpu" out of targets')
