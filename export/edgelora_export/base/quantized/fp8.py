"""FP8 weights with scales per tensor, row or block: transformers' own form, FBGEMM's, MXFP8 and ModelOpt's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from edgelora_export.base.quantized.weights.checks import list_modules
from edgelora_export.base.quantized.weights.scaled import open_scaled
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora_export.base.quantized.weights.dequantized_tensors import Weight
    from edgelora_export.base.tensors import Tensors

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
_SCALES = ("weight_scale_inv", "weight_scale")  # both are multiplied, although the first is called an inverse


def find_weights(stored: Tensors, settings: Mapping[str, Any]) -> dict[str, Weight]:
    """Finds the weights in float8.

    Layout: https://github.com/deepseek-ai/DeepSeek-V3/blob/b4e06d8/README_WEIGHTS.md and transformers' FineGrainedFP8Config.
    Raises InputError for a weight without scales, and for scales that contradict weight_block_size.
    """
    block = _read_block(settings)
    found: dict[str, Weight] = {}
    for module in list_modules(stored, "weight"):
        weight = f"{module}.weight"
        if stored.dtype(weight) not in FLOAT8:
            continue
        scales = [name for part in _SCALES if (name := f"{module}.{part}") in stored.files]
        if not scales:
            raise InputError(f"tensor {weight} is {stored.dtype(weight)} without {' or '.join(_SCALES)}; download the base again")
        found[weight] = open_scaled(stored, weight, scales[0], block=block)
    return found


def _read_block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    value = settings.get("weight_block_size")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(size) is int and size > 0 for size in value):
        raise InputError(f"quantization_config has weight_block_size = {value!r} in config.json, which is not two sizes")
    return value[0], value[1]
