"""Where the operator library is, and what it has for this machine."""

from __future__ import annotations

import ctypes
from pathlib import Path

_SUFFIXES = {".so", ".dylib", ".dll"}


def library_path() -> Path:
    """The library that onnxruntime's SessionOptions.register_custom_ops_library takes."""
    return next(file for file in Path(__file__).parent.iterdir() if file.suffix in _SUFFIXES)


def instruction_set() -> str | None:
    """What the kernels run on here, "avx2" or "avx512-vnni"; None where there are no kernels for this machine."""
    ask = ctypes.CDLL(str(library_path())).edgelora_kernels
    ask.restype = ctypes.c_char_p
    name: bytes | None = ask()
    return None if name is None else name.decode("ascii")
