"""The tensors of a folder in the Hugging Face layout: one safetensors file, or several with an index."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from edgelora_export.base.files import read_json
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES: Mapping[str, np.dtype[Any]] = {  # by safetensors' names
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
NAMES: Mapping[np.dtype[Any], str] = {kind: name for name, kind in _DTYPES.items()}


@dataclass(frozen=True)
class _Place:
    """The place of a tensor in its file. start: bytes from the beginning of the file."""

    kind: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class SafetensorsFolder:
    """The tensors of a folder. Satisfies Tensors.

    The header of each file is read once, and each tensor from its own bytes. safetensors' reader for numpy has no float8, and
    opening a file for each tensor costs more than reading a small one.
    """

    folder: Path
    files: Mapping[str, str]
    _headers: dict[str, Mapping[str, _Place]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> SafetensorsFolder:
        """Finds the file of each tensor. Raises InputError if files are missing or broken."""
        if (folder / INDEX).is_file():
            files = read_json(folder / INDEX, "a sharded base needs it").get("weight_map", {})
            if missing := sorted({file for file in files.values() if not (folder / file).is_file()}):
                raise InputError(f"base {folder} lacks {', '.join(missing)}, which {INDEX} names; download it again")
        elif (folder / SINGLE).is_file():
            files = dict.fromkeys(_read_names(folder / SINGLE), SINGLE)
        else:
            raise InputError(f"base {folder} has neither {SINGLE} nor {INDEX}; pickled checkpoints are not supported")
        return cls(folder, files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._place(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        kind = self._place(name).kind
        if kind not in _DTYPES:
            raise InputError(f"tensor {name} of {self._path(name)} is stored as {kind}, which is not supported")
        return _DTYPES[kind]

    def read(self, name: str) -> NDArray[Any]:
        return self._read(name, self.shape(name), 0)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        shape = self.shape(name)
        start, stop, _ = slice(start, stop).indices(shape[0])
        return self._read(name, (max(stop - start, 0), *shape[1:]), start * prod(shape[1:]))

    def _read(self, name: str, shape: tuple[int, ...], skipped: int) -> NDArray[Any]:
        kind, count, path = self.dtype(name), prod(shape), self._path(name)
        try:
            with path.open("rb") as file:
                file.seek(self._place(name).start + skipped * kind.itemsize)
                values = np.fromfile(file, kind, count)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error})") from error
        if values.size != count:
            raise InputError(f"{path} became shorter while it was read; download it again")
        return values.reshape(shape)

    def _place(self, name: str) -> _Place:
        file = self.files[name]
        if file not in self._headers:
            self._headers[file] = _read_header(self._path(name))
        if name not in self._headers[file]:
            raise InputError(f"{self._path(name)} has no tensor {name}, which {INDEX} places there; download it again")
        return self._headers[file][name]

    def _path(self, name: str) -> Path:
        return self.folder / self.files[name]


def _read_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except Exception as error:  # safetensors raises its own type besides OSError
        raise InputError(f"{path} is not a readable safetensors file ({error}); download it again") from error


def _read_header(path: Path) -> Mapping[str, _Place]:
    """Reads the place of each tensor of a file.

    The layout is 8 bytes that give the header's length N, N bytes of JSON, and the data
    (https://github.com/huggingface/safetensors/blob/ead9d7b/README.md#format). safetensors itself checks the file first.
    """
    _read_names(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        name: _Place(entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }
