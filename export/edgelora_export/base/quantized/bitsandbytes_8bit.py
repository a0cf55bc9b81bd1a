"""bitsandbytes in 8 bits (LLM.int8()): int8 rows, each with the largest magnitude that it had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.base.quantized.weights.checks import check_dtype, check_shape, list_modules, read_shape
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgelora_export.base.quantized.weights.dequantized_tensors import Weight
    from edgelora_export.base.tensors import Tensors

_ROWS = 0  # weight_format: rows lie one after the other; others are tiles of old GPUs
_LARGEST = np.float32(127)


@dataclass(frozen=True)
class Weight8bit:
    """A weight of Linear8bitLt. Satisfies Weight."""

    stored: Tensors
    module: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]

    def read_rows(self, start: int, stop: int) -> NDArray[np.float32]:
        largest = self.stored.read(f"{self.module}.SCB").astype(np.float32)[start:stop, None]
        values: NDArray[np.float32] = self.stored.read_rows(f"{self.module}.weight", start, stop).astype(np.float32)
        values *= largest / _LARGEST
        return values


def find_weights(stored: Tensors, _settings: Mapping[str, Any]) -> dict[str, Weight]:
    """Finds the weights that Linear8bitLt stored.

    Layout: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/20e1677/bitsandbytes/nn/modules.py
    (Linear8bitLt._save_to_state_dict). Raises InputError if a tensor is missing or does not fit.
    """
    found: dict[str, Weight] = {}
    for module in list_modules(stored, "SCB"):
        weight, reason = f"{module}.weight", f"{module}.SCB"
        shape = read_shape(stored, weight, reason, dimensions=2)
        check_dtype(stored, weight, np.int8, reason)
        check_shape(stored, f"{module}.SCB", shape[:1], reason=weight)
        parts = [weight, f"{module}.SCB"]
        if (order := f"{module}.weight_format") in stored.files:
            parts.append(order)
            if any(stored.read(order).reshape(-1) != _ROWS):
                raise InputError(f"tensor {order} says that {weight} lies in tiles, not rows; save the base again on a newer GPU")
        found[weight] = Weight8bit(stored, module, shape, tuple(parts))
    return found
