"""Reads single values of a GGUF file's metadata, and says in one line what is missing or impossible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_MOST = 1 << 31


@dataclass(frozen=True)
class Values:
    """The metadata under one prefix, such as `llama.` or `tokenizer.ggml.`. path: the file, for messages."""

    path: Path
    metadata: Mapping[str, Any]
    prefix: str

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def fail(self, key: str, reason: str) -> InputError:
        return InputError(f"{self.prefix}{key} in {self.path} {reason}")

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Returns a number from `least` on. Where the file has one per layer, they must be equal."""
        value = self._find(key, default)
        if isinstance(value, np.ndarray):
            if not len(value) or (value != value[0]).any():
                raise self.fail(key, "differs from layer to layer, which edgelora cannot build")
            value = value[0].item()
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _MOST:
            raise self.fail(key, f"is no number from {least} on")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a finite number."""
        value = self._find(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
            raise self.fail(key, "is no finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._find(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "is neither true nor false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._find(key, default)
        if not isinstance(value, str):
            raise self.fail(key, "is no text")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._find(key, None)
        if not isinstance(value, list):
            raise self.fail(key, "is no list of texts")
        return value

    def numbers(self, key: str, count: int) -> np.ndarray[Any, Any]:
        """Returns an array of so many numbers."""
        value = self._find(key, None)
        if not isinstance(value, np.ndarray) or len(value) != count:
            raise self.fail(key, f"is no list of {count} numbers")
        return value

    def _find(self, key: str, default: Any) -> Any:
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            raise self.fail(key, "is missing; convert the model again with llama.cpp's convert_hf_to_gguf.py")
        return value
