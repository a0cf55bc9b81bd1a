"""AutoRound's own checkpoints, which lay codes out as GPTQ or AWQ does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_export.base.quantized import awq, gptq
from edgelora_export.base.quantized.weights.checks import list_modules
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora_export.base.quantized.weights.dequantized_tensors import Weight
    from edgelora_export.base.tensors import Tensors

# What is added to a stored zero point, by packing_format
_GPTQ = {"auto_round": 0, "auto_round:auto_gptq": 1}
_AWQ = "auto_round:auto_awq"


def find_weights(stored: Tensors, settings: Mapping[str, Any]) -> dict[str, Weight]:
    """Finds the weights that AutoRound stored.

    Layout: https://github.com/intel/auto-round/blob/c6e0e72/auto_round/export/export_to_autoround/export.py.
    Raises InputError for its other packing formats, and for tensors that do not fit.
    """
    form = str(settings.get("packing_format") or "auto_round:auto_gptq")
    if form == _AWQ:
        return awq.find_weights(stored, {**settings, "version": "gemm"})
    if form not in _GPTQ:
        raise InputError(f"AutoRound's packing_format = {form!r} is not read, only {', '.join((*_GPTQ, _AWQ))}")
    return {
        f"{module}.weight": gptq.open_weight(stored, module, settings, _GPTQ[form]) for module in list_modules(stored, "qweight")
    }
