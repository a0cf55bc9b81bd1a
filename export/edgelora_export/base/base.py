"""Opens a base model, whatever kind of file it is, and reads it one tensor at a time."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes as ml_dtypes  # numpy knows bfloat16, which most bases are, only once this is imported
import numpy as np

from edgelora_export.base.files import read_json
from edgelora_export.base.gguf.open import SUFFIX, open_gguf
from edgelora_export.base.safetensors_folder import SafetensorsFolder
from edgelora_export.base.texts import TextsOfFolder
from edgelora_runtime.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgelora_export.base.tensors import Tensors

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "chat_template*")


@dataclass(frozen=True)
class Base:
    """A base on disk.

    path: its folder or file. config: config.json as transformers reads it. tensors: by transformers' names. texts: its configs,
    tokenizer and chat templates, by file name.
    """

    path: Path
    config: dict[str, Any]
    tensors: Tensors
    texts: Mapping[str, bytes]

    @classmethod
    def open(cls, path: Path | str) -> Base:
        """Opens a local folder, or a GGUF file. Raises InputError if files are missing or broken."""
        path = Path(path)
        if path.suffix == SUFFIX and path.is_file():
            return cls(path, *open_gguf(path))
        if not path.is_dir():
            raise InputError(f"base {path} is neither a folder in the Hugging Face layout nor a {SUFFIX} file")
        config = read_json(path / "config.json", "a base needs it")
        return cls(path, config, SafetensorsFolder.open(path), TextsOfFolder(path))

    @classmethod
    def find(cls, name: str) -> Base:
        """Opens a local folder or a hub id, from the local hub cache or by download."""
        if Path(name).exists() or name.endswith(SUFFIX) or not _HUB_ID.fullmatch(name):
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

    @property
    def name(self) -> str:
        """The name of its folder or file, for people."""
        return self.path.resolve().name

    def __contains__(self, name: str) -> bool:
        return name in self.tensors.files

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Reads a tensor as float32, in the checkpoint's shape. Raises InputError if it is absent or not finite."""
        self._check_name(name)
        return self._as_float(name, self.tensors.read(name))

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Reads some rows of a matrix as float32, without reading the others."""
        self._check_name(name)
        return self._as_float(name, self.tensors.read_rows(name, start, stop))

    @cached_property
    def sha256(self) -> str:
        """The identity of the weights: SHA-256 over name, dtype, shape and bytes of each tensor, independent of the sharding."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors.files):
            values = self.tensors.read(name)
            digest.update(f"{name}\0{values.dtype}\0{values.shape}\0".encode())
            digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def _as_float(self, name: str, raw: NDArray[Any]) -> NDArray[np.float32]:
        values = raw.astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError(f"tensor {name} of base {self.path} holds NaN or infinity; the checkpoint is broken")
        return values

    def _check_name(self, name: str) -> None:
        if name not in self:
            raise InputError(f"base {self.path} has no tensor {name}; check that config.json names its architecture")
