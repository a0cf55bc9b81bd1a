"""Reads the header of a GGUF file: its metadata, and the place, shape and type of each tensor.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes the format. The gguf package has a reader, too. It makes two
numpy arrays per token (docs/log.md has its time and memory), and it trusts the counts in the file.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_ALIGNMENT = 32  # bytes, if general.alignment says nothing else
_MOST_ENTRIES = 1 << 22  # of an array, of the metadata, of the tensors: 16 times the largest vocabulary
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 1 << 16  # bytes


@dataclass(frozen=True)
class Place:
    """The place of a tensor in its file.

    offset: of its first byte. shape: rows first, as numpy counts. kind: its GGMLQuantizationType, as a number.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    kind: int


@dataclass(frozen=True)
class Header:
    """The header of a file. metadata: scalars, texts, lists of texts and arrays, by key. tensors: by GGUF's names."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Place]


def read_header(path: Path) -> Header:
    """Reads the header of one file, and checks that the file holds every tensor whole. Raises InputError if it is broken."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            return _read(_Cursor(path, file, size), size)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from error


class _Cursor:
    """A position in a file, which reads numbers and texts and never more than the file holds."""

    def __init__(self, path: Path, file: IO[bytes], size: int) -> None:
        self.path = path
        self._file, self._left = file, size

    def fail(self, reason: str) -> InputError:
        return InputError(f"{self.path} is not a whole GGUF file ({reason}); download it again")

    def take(self, count: int) -> bytes:
        if count > self._left:
            raise self.fail(f"it ends {count - self._left} bytes early")
        taken = self._file.read(count)
        if len(taken) < count:
            raise self.fail("it was cut while it was read")
        self._left -= count
        return taken

    def count(self, layout: str, what: str, most: int = _MOST_ENTRIES) -> int:
        value: int = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        if value > most:
            raise self.fail(f"it claims {value} {what}")
        return value

    def text(self, most: int = 1 << 62) -> str:
        try:
            return self.take(self.count("<Q", "bytes of a text", most)).decode()
        except UnicodeDecodeError as error:
            raise self.fail("a text in it is not UTF-8") from error

    def value(self) -> Any:
        """Reads a value of the metadata: a scalar, a text, a list of texts, or an array of numbers."""
        kind = self.count("<I", "as the type of a value", max(_SCALARS))
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            kind = self.count("<I", "as the type of an array", max(_SCALARS))
            length = self.count("<Q", "entries of an array")
            if kind == _STRING:
                return [self.text() for _ in range(length)]
            return self._numbers(kind, length)
        number = self._numbers(kind, 1)[0]
        return float(str(number)) if kind == _FLOAT32 else number.item()  # 1e-05, as its writer had it, not 9.999999747e-06

    def _numbers(self, kind: int, length: int) -> np.ndarray[Any, Any]:
        if kind not in _SCALARS:
            raise self.fail("an array in it holds arrays")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(length * dtype.itemsize), dtype)

    @property
    def left(self) -> int:
        return self._left


def _read(cursor: _Cursor, size: int) -> Header:
    if cursor.take(len(_MAGIC)) != _MAGIC:
        raise InputError(f"{cursor.path} is not a GGUF file: its first bytes are not {_MAGIC.decode()}")
    version = struct.unpack("<I", cursor.take(4))[0]
    if version not in _VERSIONS:
        supported = " and ".join(map(str, _VERSIONS))
        raise InputError(
            f"{cursor.path} is version {version} of GGUF, or big-endian; supported: little-endian files of version {supported}"
        )
    tensor_count, value_count = cursor.count("<Q", "tensors"), cursor.count("<Q", "values")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text(_LONGEST_NAME)
        if key in metadata:
            raise cursor.fail("a key stands in it twice")
        metadata[key] = cursor.value()
    listed = [_read_tensor(cursor) for _ in range(tensor_count)]
    if len({name for name, *_ in listed}) < tensor_count:
        raise cursor.fail("a tensor stands in it twice")
    return Header(metadata, _find_places(cursor, metadata, listed, size))


def _read_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Reads a tensor's name, shape, type, and offset from the start of the data."""
    name = cursor.text(_LONGEST_NAME)
    dimensions = cursor.count("<I", "dimensions of a tensor", _MOST_DIMENSIONS)
    shape = tuple(cursor.count("<Q", "rows or columns", 1 << 40) for _ in range(dimensions))[::-1]
    return name, shape, cursor.count("<I", "as the type of a tensor", 1 << 31), cursor.count("<Q", "as an offset", 1 << 62)


def _find_places(
    cursor: _Cursor, metadata: Mapping[str, Any], listed: list[tuple[str, tuple[int, ...], int, int]], size: int
) -> dict[str, Place]:
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise cursor.fail("its general.alignment is not a number of bytes")
    start = -(-(size - cursor.left) // alignment) * alignment
    places = {name: Place(cursor.path, start + offset, shape, kind) for name, shape, kind, offset in listed}
    for name, place in places.items():
        if not name.isprintable() or 0 in place.shape or not place.shape:
            raise cursor.fail("a tensor in it has no entries or no printable name")
        end = place.offset + count_bytes(place, name)
        if end > size:
            raise cursor.fail(f"it ends {end - size} bytes before the end of {name}")
    return places


def count_bytes(place: Place, name: str) -> int:
    """Counts a tensor's bytes. Raises InputError if the gguf package does not know its type."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    sizes = {kind.value: size for kind, size in GGML_QUANT_SIZES.items()}
    if place.kind not in sizes:
        raise InputError(f"{name} in {place.path} has the unknown type {place.kind}; a newer gguf package may know it")
    block, bytes_per_block = sizes[place.kind]
    if place.shape[-1] % block:
        kind = GGMLQuantizationType(place.kind).name
        raise InputError(f"{name} in {place.path} has rows of {place.shape[-1]} entries, which {kind} cannot hold")
    return math.prod(place.shape) // block * bytes_per_block
