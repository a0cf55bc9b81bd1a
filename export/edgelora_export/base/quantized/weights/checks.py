"""Checks of a quantized checkpoint: its tensors must be there, in the shapes that its config.json implies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora_export.base.tensors import Tensors


def check_shape(stored: Tensors, name: str, *allowed: tuple[int, ...], reason: str) -> None:
    """Raises InputError if a tensor is absent or has none of the shapes. reason: what implies them."""
    found = read_shape(stored, name, reason)
    if found not in allowed:
        wanted = " or ".join(str(list(shape)) for shape in allowed)
        raise InputError(f"tensor {name} has the shape {list(found)}, where {reason} needs {wanted}; download the base again")


def read_shape(stored: Tensors, name: str, reason: str, dimensions: int | None = None) -> tuple[int, ...]:
    """Reads a tensor's shape. reason: what needs the tensor.

    Raises InputError if it is absent or has another number of dimensions.
    """
    if name not in stored.files:
        raise InputError(f"tensor {name} is missing, which {reason} needs; download the base again")
    shape = stored.shape(name)
    if dimensions is not None and len(shape) != dimensions:
        raise InputError(f"tensor {name} has {len(shape)} dimensions, where {reason} needs {dimensions}")
    return shape


def read_whole(settings: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Reads a whole number from the quantization settings.

    Raises InputError if it is another thing, or absent without a default.
    """
    value = settings.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"quantization_config has {key} = {value!r} in config.json, which is not a whole number")
    return value


def list_modules(stored: Tensors, part: str) -> list[str]:
    """Lists the modules that have a tensor of this name, such as qweight, in the order of their names."""
    return sorted(name.removesuffix(f".{part}") for name in stored.files if name.endswith(f".{part}"))
