"""compressed-tensors, the format of LLM Compressor and vLLM: integers packed or plain, float8, NVFP4 and the MX formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.base.quantized.fp8 import FLOAT8
from edgelora_export.base.quantized.weights.checks import check_dtype, check_order, check_shape, list_modules, read_shape
from edgelora_export.base.quantized.weights.codes import list_groups, scale_groups, unpack_bits
from edgelora_export.base.quantized.weights.microscaled import open_microscaled
from edgelora_export.base.quantized.weights.scaled import find_block, open_scaled, read_grid
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgelora_export.base.quantized.weights.dequantized_tensors import Weight
    from edgelora_export.base.tensors import Tensors

_NVFP4_GROUP, _MX_GROUP = 16, 32
_NATURAL = -1  # older writers fill weight_g_idx with it where groups follow each other


@dataclass(frozen=True)
class PackedWeight:
    """Integers of 1 to 8 bits in int32 words. Satisfies Weight.

    weight_packed: (N, ⌈K·bits/32⌉), codes that count from the lowest. weight_scale: (N, G). weight_zero_point, if there is one:
    packed like the weight, but down the rows, (⌈N·bits/32⌉, G). weight_g_idx, if there is one: the group of each column, (K,).
    """

    stored: Tensors
    module: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    bits: int
    block: tuple[int, int]

    def read_rows(self, start: int, stop: int) -> NDArray[np.float32]:
        rows, columns = self.shape
        codes = unpack_bits(self.stored.read_rows(f"{self.module}.weight_packed", start, stop), self.bits, columns)
        scales = read_grid(self.stored, f"{self.module}.weight_scale")
        zeros: NDArray[Any] = np.full((1, scales.shape[1]), 1 << (self.bits - 1), np.int16)
        if f"{self.module}.weight_zero_point" in self.parts:
            zeros = unpack_bits(self._read("weight_zero_point").T, self.bits, rows).T[start:stop]
        places = np.arange(start, stop) // self.block[0]
        return scale_groups(codes, scales[places], zeros, self._read_groups())

    def _read(self, part: str) -> NDArray[Any]:
        return self.stored.read(f"{self.module}.{part}")

    def _read_groups(self) -> NDArray[np.intp]:
        if f"{self.module}.weight_g_idx" not in self.parts or (order := self._read("weight_g_idx"))[0] == _NATURAL:
            return list_groups(self.shape[1], self.block[1])
        return order.astype(np.intp)


def find_weights(stored: Tensors, settings: Mapping[str, Any]) -> dict[str, Weight]:
    """Finds the weights that compressed-tensors stored. The tensors of each module say which of its formats that is.

    Layouts: https://github.com/neuralmagic/compressed-tensors/tree/52792be/src/compressed_tensors/compressors.
    Raises InputError for sparse formats and rotations, and for tensors that contradict config.json.
    """
    _check_settings(settings)
    schemes = _read_schemes(settings)
    found: dict[str, Weight] = {}
    for module in list_modules(stored, "weight_packed"):
        packed = stored.dtype(f"{module}.weight_packed")
        found[f"{module}.weight"] = (
            _open_floats(stored, module) if packed == np.uint8 else _open_integers(stored, module, schemes)
        )
    for module in list_modules(stored, "weight"):
        weight, scale, zero = (f"{module}.{part}" for part in ("weight", "weight_scale", "weight_zero_point"))
        if stored.dtype(weight) == np.int8 or stored.dtype(weight) in FLOAT8:
            block = _find_said_block(stored, weight, scale, schemes)
            found[weight] = open_scaled(stored, weight, scale, zero if zero in stored.files else None, block=block)
    return found


def _check_settings(settings: Mapping[str, Any]) -> None:
    sparsity = settings.get("sparsity_config")
    for form in (settings.get("format"), sparsity.get("format") if isinstance(sparsity, dict) else None):
        if isinstance(form, str) and form.startswith(("sparse", "marlin")):
            raise InputError(f"compressed-tensors' format {form!r} is not read; take a checkpoint without sparsity")
    if settings.get("transform_config"):
        raise InputError(
            "compressed-tensors' transform_config rotates activations, which edgelora does not; take another checkpoint"
        )


def _read_schemes(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reads how each group of modules holds its weights. Raises InputError if config.json does not say so."""
    groups = settings.get("config_groups")
    schemes = [group.get("weights") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    found = [scheme for scheme in schemes if isinstance(scheme, dict)]
    if not found:
        raise InputError("quantization_config has no config_groups with weights in config.json; download the base again")
    if wrong := [bits for scheme in found if type(bits := scheme.get("num_bits")) is not int or not 1 <= bits <= 16]:
        raise InputError(f"quantization_config has num_bits = {wrong[0]!r} in config.json, which is not 1 to 16")
    return found


def _find_said_block(stored: Tensors, weight: str, scale: str, schemes: list[dict[str, Any]]) -> tuple[int, int] | None:
    """Finds the block_structure that a weight's scales have. None if they are not in such blocks."""
    shape, found = read_shape(stored, weight, scale, dimensions=2), read_shape(stored, scale, weight)
    for scheme in schemes:
        sizes = scheme.get("block_structure")
        if isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes):
            rows, columns = sizes
            if found == (-(-shape[0] // rows), -(-shape[1] // columns)):
                return rows, columns
    return None


def _open_integers(stored: Tensors, module: str, schemes: list[dict[str, Any]]) -> Weight:
    packed, scale, size, zero, order = (
        f"{module}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    )
    check_shape(stored, size, (2,), reason=packed)
    rows, columns = (int(value) for value in stored.read(size))
    words = read_shape(stored, packed, size, dimensions=2)
    fitting = {bits for scheme in schemes if (bits := scheme["num_bits"]) <= 8 and words == (rows, -(-columns * bits // 32))}
    if len(fitting) != 1 or stored.dtype(packed) != np.int32 or min(rows, columns) < 1:
        said = ", ".join(sorted({str(scheme["num_bits"]) for scheme in schemes}))
        raise InputError(
            f"tensor {packed} is {stored.dtype(packed)} {list(words)}, which {size} {[rows, columns]} fits in none of the "
            f"numbers of bits in config.json ({said})"
        )
    (bits,) = fitting
    block = find_block(stored, scale, (rows, columns))
    parts = [packed, scale, size]
    if zero in stored.files:
        parts.append(zero)
        check_dtype(stored, zero, np.int32, packed)
        check_shape(stored, zero, (-(-rows * bits // 32), columns // block[1]), reason=scale)
    elif all(scheme.get("symmetric") is False for scheme in schemes):
        raise InputError(f"tensor {zero} is missing, which symmetric = false in config.json needs; download the base again")
    if order in stored.files:
        parts.append(order)
        check_shape(stored, order, (columns,), reason=size)
        if (stored.read(order) != _NATURAL).any():
            check_order(stored, order, columns, columns // block[1])
    return PackedWeight(stored, module, (rows, columns), tuple(parts), bits, block)


def _open_floats(stored: Tensors, module: str) -> Weight:
    packed, scale, overall = (f"{module}.{part}" for part in ("weight_packed", "weight_scale", "weight_global_scale"))
    if overall in stored.files:
        return open_microscaled(stored, packed, scale, overall, group_size=_NVFP4_GROUP, divide=True)
    check_dtype(stored, scale, np.uint8, "an MX format")
    return open_microscaled(stored, packed, scale, None, group_size=_MX_GROUP)
