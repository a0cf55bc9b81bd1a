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

from edgelora_export.base.files import look_up
from edgelora_export.base.fit import check_fit
from edgelora_export.base.gguf.open import SUFFIX, open_gguf
from edgelora_export.base.head import settle_head
from edgelora_export.base.kinds import check_kind, read_config
from edgelora_export.base.quantized.dequantize import dequantize
from edgelora_export.base.safetensors_folder import SafetensorsFolder
from edgelora_export.base.text_part import take_text_config, take_text_tensors
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

    path: its folder or file. config: config.json as transformers reads it, of a multimodal model the text part's. tensors: by the
    names that transformers gives them in a plain model. texts: its configs, tokenizer and chat templates, by file name.
    """

    path: Path
    config: dict[str, Any]
    tensors: Tensors
    texts: Mapping[str, bytes]

    @classmethod
    def open(cls, path: Path | str) -> Base:
        """Opens a local folder in the Hugging Face layout, or a GGUF file, and checks it without reading a weight.

        Raises InputError, with what lies there instead and what to give, for anything that export would refuse later.
        """
        path = Path(path)
        look_up(path)
        if path.suffix == SUFFIX and path.is_file():
            base = cls(path, *open_gguf(path))
            check_fit(base.config, base.tensors, path)
            return base
        if not path.is_dir():
            raise InputError(f"base {path} is neither a folder in the Hugging Face layout nor a {SUFFIX} file")
        whole = read_config(path)
        check_kind(whole, str(path))
        tensors, whole = dequantize(SafetensorsFolder.open(path), whole, path)
        config = take_text_config(whole, path)
        if config["model_type"] != whole["model_type"]:
            check_kind(config, f"{path} (its text part)")
            tensors = take_text_tensors(tensors)
        config, tensors = settle_head(config, tensors)
        check_fit(config, tensors, path)
        return cls(path, config, tensors, TextsOfFolder(path))

    @classmethod
    def find(cls, name: str) -> Base:
        """Opens a local folder, a GGUF file, or a hub id, from the local hub cache or by download.

        A download starts with the configs, so that a model of another kind is refused before its weights are fetched.
        """
        if look_up(Path(name)) or name.endswith(SUFFIX) or not _HUB_ID.fullmatch(name):
            return cls.open(name)
        try:
            from huggingface_hub import snapshot_download
        except ImportError as error:
            raise MissingExtraError("huggingface_hub", "export") from error
        try:
            check_kind(read_config(Path(snapshot_download(name, allow_patterns=["*.json"]))), name)
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
