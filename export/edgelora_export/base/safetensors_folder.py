"""The tensors of a folder in the Hugging Face layout: one safetensors file, or several with an index."""

from __future__ import annotations

from dataclasses import dataclass
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
class SafetensorsFolder:
    """The tensors of a folder. Satisfies Tensors."""

    folder: Path
    files: Mapping[str, str]

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
        with safe_open(self._path(name), framework="numpy") as file:
            return tuple(file.get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype[Any]:
        with safe_open(self._path(name), framework="numpy") as file:
            kind: str = file.get_slice(name).get_dtype()
        return _DTYPES[kind]

    def read(self, name: str) -> NDArray[Any]:
        with safe_open(self._path(name), framework="numpy") as file:
            values: NDArray[Any] = file.get_tensor(name)
        return values

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        with safe_open(self._path(name), framework="numpy") as file:
            values: NDArray[Any] = file.get_slice(name)[start:stop]
        return values

    def _path(self, name: str) -> Path:
        return self.folder / self.files[name]


def _read_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except Exception as error:  # safetensors raises its own type besides OSError
        raise InputError(f"{path} is not a readable safetensors file ({error}); download it again") from error
