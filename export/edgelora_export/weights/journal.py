"""Which weights of a bundle in the making are finished, so that an export that was killed goes on where it was."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.quantize.int4 import Grid
from edgelora_export.weights.blobs import StoredTensor
from edgelora_export.weights.publish import BLOB
from edgelora_export.weights.stored import StoredWeights
from edgelora_runtime.bundle.folder import hash_file

if TYPE_CHECKING:
    from pathlib import Path


class Journal:
    """A line per finished product, beside the folder that holds its blob.

    path: the file, to which lines are added; None keeps no journal. folder: where the blobs lie. What an earlier run
    finished is taken up where its blob is whole; whether it was of the same plan is the caller's to see to.
    """

    def __init__(self, path: Path | None, folder: Path) -> None:
        self._path = path
        self._finished: dict[tuple[str, str], StoredWeights] = {}
        if path is None or not path.exists():
            return
        _, *lines, cut_short = path.read_bytes().split(b"\n")  # the plan, finished products, and where a kill came down
        os.truncate(path, path.stat().st_size - len(cut_short))
        whole = _check_blobs(folder)
        for line in lines:
            key, weights = _parse(line)
            if whole.issuperset(tensor.location for tensor in weights.tensors.values()):
                self._finished[key] = weights

    def section(self, name: str) -> JournalSection:
        """The products of one variant; "" is the bare base, and what all variants share."""
        return JournalSection(self, name)

    def find(self, section: str, product: str) -> StoredWeights | None:
        return self._finished.get((section, product))

    def note(self, section: str, product: str, weights: StoredWeights) -> StoredWeights:
        self._finished[section, product] = weights
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_dump(section, product, weights) + "\n")
        return weights


@dataclass(frozen=True)
class JournalSection:
    """What a journal knows of one variant's products."""

    journal: Journal
    name: str

    def find(self, product: str) -> StoredWeights | None:
        """A product's weights, None while they are not finished."""
        return self.journal.find(self.name, product)

    def note(self, product: str, weights: StoredWeights) -> StoredWeights:
        """Writes down that a product is finished; returns its weights."""
        return self.journal.note(self.name, product, weights)


def _check_blobs(folder: Path) -> set[str]:
    """The blobs whose content is what their names say; removes the others, which would otherwise pass for stored."""
    whole = set()
    for path in folder.glob(f"*{BLOB}"):
        if f"{hash_file(path)}{BLOB}" == path.name:
            whole.add(path.name)
        else:
            path.unlink()
    return whole


def _dump(section: str, product: str, weights: StoredWeights) -> str:
    tensors = {name: {**vars(tensor), "dtype": tensor.dtype.str} for name, tensor in weights.tensors.items()}
    grids = {name: asdict(grid) for name, grid in weights.grids.items()}
    return json.dumps({"section": section, "product": product, "tensors": tensors, "grids": grids})


def _parse(line: bytes) -> tuple[tuple[str, str], StoredWeights]:
    """Inverse of _dump."""
    value: dict[str, Any] = json.loads(line)
    tensors = {
        name: StoredTensor(np.dtype(entry["dtype"]), tuple(entry["shape"]), entry["location"], entry["offset"], entry["length"])
        for name, entry in value["tensors"].items()
    }
    grids = {name: Grid(**grid) for name, grid in value["grids"].items()}
    return (value["section"], value["product"]), StoredWeights(tensors, grids)
