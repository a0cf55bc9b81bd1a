"""Blobs: files of raw tensors, named by their own SHA-256, so that equal tensors are stored once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.weights.publish import BLOB, write_file

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

ALIGNMENT = 64  # bytes: a cache line, and enough for any vector load from the mapped file


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor: `length` bytes from `offset` in the file `location`, little-endian, row-major."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    location: str
    offset: int
    length: int


def write_blob(folder: Path, tensors: dict[str, NDArray[Any]]) -> dict[str, StoredTensor]:
    """Writes the tensors of one group to <sha256>.bin, unless that file exists. Returns the place of each tensor."""
    stored: dict[str, tuple[NDArray[Any], int]] = {}
    chunks: list[bytes | memoryview] = []
    offset = 0
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor)
        padding = -offset % ALIGNMENT
        chunks.append(bytes(padding))
        offset += padding
        stored[name] = (raw, offset)
        chunks.append(raw.reshape(-1).view(np.uint8).data)
        offset += raw.nbytes
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    location = f"{digest.hexdigest()}{BLOB}"
    if not (folder / location).exists():
        temporary = folder / f"{location}.part"
        write_file(temporary, chunks)
        temporary.replace(folder / location)
    return {name: StoredTensor(raw.dtype, raw.shape, location, offset, raw.nbytes) for name, (raw, offset) in stored.items()}


def read_stored(folder: Path, tensor: StoredTensor) -> NDArray[Any]:
    """Reads one tensor that write_blob wrote, as a read-only map of the file."""
    return np.memmap(folder / tensor.location, tensor.dtype, "r", tensor.offset, tensor.shape)
