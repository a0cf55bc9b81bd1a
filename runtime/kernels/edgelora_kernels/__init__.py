"""The path of the operator library, its instruction set on this machine, and the number of its interface."""

from __future__ import annotations

import ctypes
from pathlib import Path

_SUFFIXES = {".so", ".dylib", ".dll"}


def library_path() -> Path:
    """Returns the path of the library for SessionOptions.register_custom_ops_library of onnxruntime."""
    return next(file for file in Path(__file__).parent.iterdir() if file.suffix in _SUFFIXES)


def instruction_set() -> str | None:
    """Returns the kernels' instruction set here, "avx2", "avx-vnni" or "avx512-vnni".

    Returns None if they do not support this machine.
    """
    ask = ctypes.CDLL(str(library_path())).edgelora_kernels
    ask.restype = ctypes.c_char_p
    name: bytes | None = ask()
    return None if name is None else name.decode("ascii")


def interface() -> int:
    """Returns the number of the operators' interface, by which edgelora tells whether they are the ones that it was made with."""
    ask = ctypes.CDLL(str(library_path())).edgelora_kernels_interface
    ask.restype = ctypes.c_int
    number: int = ask()
    return number
