"""The tensors of a folder in the Hugging Face layout: one safetensors file, or several with an index."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from edgelora_export.base.files import read_json
from edgelora_runtime.errors import InputError, make_printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
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
_FILE_NAME = re.compile(r"[^/\\:\0]+\.safetensors")  # a file of the folder itself, on any system
_PICKLES = ("pytorch_model*.bin", "consolidated*.pth", "model*.ckpt")


@dataclass(frozen=True)
class Place:
    """The place of a tensor in its file. kind: its type, by safetensors' name. start: bytes from the beginning of the file."""

    kind: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class SafetensorsFolder:
    """The tensors of a folder. Satisfies Tensors.

    Each file's header is read once, and each tensor from its own bytes. safetensors' reader for numpy has no float8, and opening
    a file for each tensor costs more than reading a small one.
    places: by tensor name.
    """

    folder: Path
    files: Mapping[str, str]
    places: Mapping[str, Place]

    @classmethod
    def open(cls, folder: Path) -> SafetensorsFolder:
        """Finds the file of each tensor, as transformers does: a whole model.safetensors wins over an index beside it.

        https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/modeling_utils.py, _get_resolved_checkpoint_files
        Raises InputError if files are missing or broken, and for an index that names a file outside of the folder.
        """
        if (folder / SINGLE).is_file():
            places = _read_header(folder / SINGLE)
            return cls(folder, dict.fromkeys(places, SINGLE), places)
        if (folder / INDEX).is_file():
            return cls(folder, *_read_shards(folder))
        if pickled := list_files(folder, _PICKLES):
            raise InputError(
                f"base {folder} holds its weights as {pickled}, which can run code when they are loaded; take a revision with "
                "safetensors files, or load it with transformers once and save it again with save_pretrained"
            )
        raise InputError(f"base {folder} has neither {SINGLE} nor {INDEX}; download its weights")

    def shape(self, name: str) -> tuple[int, ...]:
        return self.places[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        kind = self.places[name].kind
        if kind not in _DTYPES:
            raise InputError(f"tensor {name} of base {self.folder} is stored as {kind}, which is not supported")
        return _DTYPES[kind]

    def read(self, name: str) -> NDArray[Any]:
        return self._read(name, self.shape(name), 0)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        shape = self.shape(name)
        start, stop, _ = slice(start, stop).indices(shape[0])
        return self._read(name, (max(stop - start, 0), *shape[1:]), start * prod(shape[1:]))

    def _read(self, name: str, shape: tuple[int, ...], skipped: int) -> NDArray[Any]:
        """Reads values of a tensor in a shape, after so many others."""
        dtype, count, path = self.dtype(name), prod(shape), self.folder / self.files[name]
        try:
            with path.open("rb") as file:
                file.seek(self.places[name].start + skipped * dtype.itemsize)
                values = np.fromfile(file, dtype, count)
        except OSError as error:
            raise InputError(f"tensor {name} of {path} cannot be read ({error.strerror})") from error
        if values.size != count:
            raise InputError(f"{path} became shorter while it was read; download it again")
        return values.reshape(shape)


def list_files(folder: Path, patterns: Sequence[str], most: int = 3) -> str:
    """Names the files of a folder that match a pattern, the first few of them. Returns "" if there are none."""
    names = sorted({make_printable(path.name) for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return ", ".join([*names[:most], *(["…"] if len(names) > most else [])])


def _read_shards(folder: Path) -> tuple[dict[str, str], dict[str, Place]]:
    """Finds the shard of each tensor. Like transformers, it trusts the shards' own headers for what they hold."""
    named = read_json(folder / INDEX, "a sharded base needs it").get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise InputError(f"{folder / INDEX}: weight_map must be an object that names a file for each tensor; download it again")
    shards = sorted(set(named.values()))
    if outside := [file for file in shards if not _FILE_NAME.fullmatch(file)]:
        raise InputError(
            f"{folder / INDEX} names {_quote(outside)}, which is no safetensors file of this folder; do not trust it"
        )
    if missing := [file for file in shards if not (folder / file).is_file()]:
        raise InputError(f"base {folder} lacks {_quote(missing)}, which {INDEX} names; download it again")
    headers = {file: _read_header(folder / file) for file in shards}
    files = {name: file for file, places in headers.items() for name in places}
    if absent := sorted(set(named) - set(files)):
        raise InputError(f"base {folder} lacks {_quote(absent)}, which {INDEX} names; download it again")
    return files, {name: headers[file][name] for name, file in files.items()}


def _quote(names: Sequence[str], most: int = 3) -> str:
    return ", ".join([*map(make_printable, names[:most]), *([f"and {len(names) - most} more"] if len(names) > most else [])])


def _read_header(path: Path) -> dict[str, Place]:
    """Reads the place of each tensor of a file, by name.

    The layout is 8 bytes that give the header's length N, N bytes of JSON, and the data
    (https://github.com/huggingface/safetensors/blob/ead9d7b/README.md#format). safetensors itself checks the file first.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (OSError, SafetensorError, ValueError) as error:
        reason = make_printable(str(error))
        raise InputError(f"{path} is not a readable safetensors file ({reason}); download it again") from error
    return {
        name: Place(entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }
