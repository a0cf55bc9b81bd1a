"""NVIDIA ModelOpt's checkpoints: FP8, and NVFP4 with a factor for the whole tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_export.base.quantized import fp8
from edgelora_export.base.quantized.weights.checks import list_modules
from edgelora_export.base.quantized.weights.microscaled import open_microscaled
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora_export.base.quantized.weights.dequantized_tensors import Weight
    from edgelora_export.base.tensors import Tensors


def find_weights(stored: Tensors, settings: Mapping[str, Any]) -> dict[str, Weight]:
    """Finds the weights that ModelOpt stored.

    Layout: https://github.com/NVIDIA/TensorRT-Model-Optimizer/blob/f5a1489/modelopt/torch/export/quant_utils.py.
    Raises InputError for its other algorithms, and for tensors that do not fit.
    """
    algorithm = settings.get("quant_algo")
    if algorithm == "FP8":
        return fp8.find_weights(stored, settings)
    if algorithm != "NVFP4":
        raise InputError(f"ModelOpt's algorithm {algorithm!r} is not read, only FP8 and NVFP4")
    return {
        f"{module}.weight": open_microscaled(
            stored, f"{module}.weight", f"{module}.weight_scale", f"{module}.weight_scale_2", group_size=16
        )
        for module in list_modules(stored, "weight_scale_2")
    }
