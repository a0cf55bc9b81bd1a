"""The weights of gpu graphs: the very codes of the cpu graphs, and in fp16 once more what those have in float32."""

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
    """Values in fp16. InputError with the advice where one is beyond its range; what is too small for it rounds towards 0."""
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= _LIMIT:
        raise InputError(f"{owner} reaches {largest:g}, which fp16 cannot hold; {advice}")
    return np.ascontiguousarray(values, np.float16)


class Fp16Copies:
    """The fp16 twins of float32 tensors in a folder's blobs, each converted once however many variants use it.

    wide: initializers that gpu graphs read in float32, from the blob that cpu graphs read.
    """

    def __init__(self, folder: Path, wide: Set[str]) -> None:
        self._folder = folder
        self._wide = wide
        self._twins: dict[StoredTensor, StoredTensor] = {}

    def copy(self, weights: StoredWeights) -> StoredWeights:
        """The same weights for a gpu graph. The float32 tensors of one blob become one blob, so that twins are shared alike."""
        groups: dict[str, dict[str, StoredTensor]] = {}
        for name, stored in weights.tensors.items():
            if stored.dtype == np.float32 and name not in self._wide:
                groups.setdefault(stored.location, {})[name] = stored
        tensors = dict(weights.tensors)
        for group in groups.values():
            tensors.update(self._store(group))
        return StoredWeights(tensors, weights.grids)

    def _store(self, group: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        known = {name: twin for name, stored in group.items() if (twin := self._twins.get(stored)) and self._exists(twin)}
        if len(known) == len(group):
            return known
        twins = write_blob(self._folder, {name: self._read(name, stored) for name, stored in group.items()})
        self._twins.update((stored, twins[name]) for name, stored in group.items())
        return twins

    def _exists(self, twin: StoredTensor) -> bool:
        """Whether its blob is there: what no variant used for a while was removed."""
        return (self._folder / twin.location).exists()

    def _read(self, name: str, stored: StoredTensor) -> NDArray[Any]:
        return to_fp16(read_stored(self._folder, stored), name, 'leave "gpu" out of targets')
