"""Checks of a quantized checkpoint: its tensors must be there, in the shapes that its config.json implies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

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

    Raises InputError if it is absent, empty, or has another number of dimensions.
    """
    if name not in stored.files:
        raise InputError(f"tensor {name} is missing, which {reason} needs; download the base again")
    shape = stored.shape(name)
    if 0 in shape:
        raise InputError(f"tensor {name} has the shape {list(shape)}, which is empty; download the base again")
    if dimensions is not None and len(shape) != dimensions:
        raise InputError(f"tensor {name} has {len(shape)} dimensions, where {reason} needs {dimensions}")
    return shape


def check_dtype(stored: Tensors, name: str, kind: type[np.generic], reason: str) -> None:
    """Raises InputError if a tensor is absent or of another type. reason: what needs the type."""
    read_shape(stored, name, reason)
    if (found := stored.dtype(name)) != kind:
        raise InputError(f"tensor {name} is {found}, where {reason} needs {np.dtype(kind)}; download the base again")


def check_order(stored: Tensors, name: str, columns: int, groups: int) -> None:
    """Raises InputError if a tensor does not give each column one of the groups."""
    reason = f"{columns} columns in {groups} groups"
    check_shape(stored, name, (columns,), reason=reason)
    order = stored.read(name)
    if order.dtype.kind not in "iu" or order.min() < 0 or order.max() >= groups:
        raise InputError(
            f"tensor {name} names groups other than 0 to {groups - 1}, where there are {reason}; download the base again"
        )


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
