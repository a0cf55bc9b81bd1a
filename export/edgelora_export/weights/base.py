"""Reads a base model in the Hugging Face layout, one tensor at a time, without holding the whole model."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes as ml_dtypes  # numpy knows bfloat16, which most bases are, only once this is imported
import numpy as np
from safetensors import safe_open

from edgelora_export.weights.files import read_json
from edgelora_runtime.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from numpy.typing import NDArray

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "chat_template.jinja")


@dataclass(frozen=True)
class Base:
    """A base on disk: its config, and the file that holds each tensor."""

    folder: Path
    config: dict[str, Any]
    shards: dict[str, Path]

    @classmethod
    def open(cls, folder: Path | str) -> Base:
        """Opens a local folder. Raises InputError if config.json or the safetensors files are missing or broken."""
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"base {folder} is not a folder; give a local folder in the Hugging Face layout")
        config = read_json(folder / "config.json", "a base needs it")
        if (folder / INDEX).is_file():
            weight_map = read_json(folder / INDEX, "a sharded base needs it").get("weight_map", {})
            shards = {name: folder / file for name, file in weight_map.items()}
            missing = sorted({path.name for path in shards.values() if not path.is_file()})
            if missing:
                raise InputError(f"base {folder} lacks {', '.join(missing)}, which {INDEX} names; download it again")
        elif (folder / SINGLE).is_file():
            shards = dict.fromkeys(_tensor_names(folder / SINGLE), folder / SINGLE)
        else:
            raise InputError(f"base {folder} has neither {SINGLE} nor {INDEX}; pickled checkpoints are not supported")
        return cls(folder, config, shards)

    @classmethod
    def find(cls, name: str) -> Base:
        """Opens a local folder or a hub id, from the local hub cache or by download."""
        if Path(name).is_dir() or not _HUB_ID.fullmatch(name):
            return cls.open(name)
        try:
            from huggingface_hub import snapshot_download
        except ImportError as error:
            raise MissingExtraError("huggingface_hub", "export") from error
        try:
            return cls.open(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
        except InputError:
            raise
        except Exception as error:  # the hub's errors and those of its network layer have no common base class
            raise InputError(
                f"base {name!r} is not a local folder and cannot be downloaded from the hub ({type(error).__name__}); "
                "download it first, or check the name"
            ) from error

    def __contains__(self, name: str) -> bool:
        return name in self.shards

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Reads a tensor as float32, in the checkpoint's shape. Raises InputError if it is absent or not finite."""
        return self._as_float(name, self._raw(name))

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Reads some rows of a matrix as float32, without reading the others."""
        self._check_name(name)
        with safe_open(self.shards[name], framework="numpy") as file:
            return self._as_float(name, file.get_slice(name)[start:stop])

    @cached_property
    def sha256(self) -> str:
        """The identity of the weights: SHA-256 over name, dtype, shape and bytes of each tensor, independent of the sharding."""
        digest = hashlib.sha256()
        for name in sorted(self.shards):
            values = self._raw(name)
            digest.update(f"{name}\0{values.dtype}\0{values.shape}\0".encode())
            digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def _raw(self, name: str) -> NDArray[Any]:
        self._check_name(name)
        with safe_open(self.shards[name], framework="numpy") as file:
            values: NDArray[Any] = file.get_tensor(name)
        return values

    def _as_float(self, name: str, raw: NDArray[Any]) -> NDArray[np.float32]:
        values = raw.astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError(f"tensor {name} of base {self.folder} holds NaN or infinity; the checkpoint is broken")
        return values

    def _check_name(self, name: str) -> None:
        if name not in self.shards:
            raise InputError(f"base {self.folder} has no tensor {name}; check that config.json names its architecture")


def _tensor_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except Exception as error:  # safetensors raises its own type besides OSError
        raise InputError(f"{path} is not a readable safetensors file ({error}); download it again") from error
