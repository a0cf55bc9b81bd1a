"""The path of the operator library, and the instruction set that it uses on this machine."""

from __future__ import annotations

import ctypes
from pathlib import Path

_SUFFIXES = {".so", ".dylib", ".dll"}


def library_path() -> Path:
    """The library to pass to SessionOptions.register_custom_ops_library of onnxruntime."""
    return next(file for file in Path(__file__).parent.iterdir() if file.suffix in _SUFFIXES)


def instruction_set() -> str | None:
    """The instruction set of the kernels here, "avx2" or "avx512-vnni"; None if they do not support this machine."""
    ask = ctypes.CDLL(str(library_path())).edgelora_kernels
    ask.restype = ctypes.c_char_p
    name: bytes | None = ask()
    return None if name is None else name.decode("ascii")
