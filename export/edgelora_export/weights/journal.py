"""The journal of an export: the weights that are finished, so that a killed export can continue."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.quantize.int4 import Grid
from edgelora_export.weights.blobs import StoredTensor
from edgelora_export.weights.full_disk import told_by_name
from edgelora_export.weights.publish import BLOB
from edgelora_export.weights.stored import StoredWeights
from edgelora_runtime.bundle.folder import hash_file

if TYPE_CHECKING:
    from pathlib import Path


class Journal:
    """One line per finished product, in a file beside the folder that holds its blob.

    path: the file to append to, None for no journal. folder: the blobs. Products that an earlier run finished are reused if their
    blobs are whole. The caller makes sure that the earlier run had the same plan.
    """

    def __init__(self, path: Path | None, folder: Path) -> None:
        self._path = path
        self._finished: dict[tuple[str, str], StoredWeights] = {}
        if path is None or not path.exists():
            return
        whole = _find_whole_blobs(folder)
        for key, weights in _read_entries(path):
            if whole.issuperset(tensor.location for tensor in weights.tensors.values()):
                self._finished[key] = weights

    def section(self, name: str) -> JournalSection:
        """Returns the section of one variant. "" is for the bare base, and for the weights that all variants share."""
        return JournalSection(self, name)

    def find(self, section: str, product: str) -> StoredWeights | None:
        return self._finished.get((section, product))

    def note(self, section: str, product: str, weights: StoredWeights) -> StoredWeights:
        self._finished[section, product] = weights
        if self._path is not None:
            with told_by_name(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(_dump(section, product, weights) + "\n")
        return weights


@dataclass(frozen=True)
class JournalSection:
    """The part of a journal that lists one variant's products."""

    journal: Journal
    name: str

    def find(self, product: str) -> StoredWeights | None:
        """Returns a product's weights, or None if they are not finished."""
        return self.journal.find(self.name, product)

    def note(self, product: str, weights: StoredWeights) -> StoredWeights:
        """Records that a product is finished. Returns its weights."""
        return self.journal.note(self.name, product, weights)


def _read_entries(path: Path) -> list[tuple[tuple[str, str], StoredWeights]]:
    """Reads a journal after its first line, the plan, up to the first line that is not whole. Truncates it there."""
    found = []
    with path.open("rb") as file:
        end = len(file.readline())
        for line in file:
            try:
                found.append(_parse(line))
            except (ValueError, KeyError, TypeError):  # cut short by a kill or a full disk, or lost with the power
                break
            end += len(line)
    os.truncate(path, end)
    return found


def _find_whole_blobs(folder: Path) -> set[str]:
    """Names the blobs whose content matches their name. Removes the others, so that they are written again."""
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
    """Parses a line that _dump wrote. Raises ValueError, KeyError or TypeError for any other."""
    if not line.endswith(b"\n"):
        raise ValueError("cut short")
    value: dict[str, Any] = json.loads(line)
    tensors = {
        name: StoredTensor(np.dtype(entry["dtype"]), tuple(entry["shape"]), entry["location"], entry["offset"], entry["length"])
        for name, entry in value["tensors"].items()
    }
    grids = {name: Grid(**grid) for name, grid in value["grids"].items()}
    return (value["section"], value["product"]), StoredWeights(tensors, grids)
