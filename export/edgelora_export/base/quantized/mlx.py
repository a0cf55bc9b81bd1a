"""MLX's affine codes, by mlx-lm and by transformers' Metal integration: code × scale + bias for each group of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.base.quantized.weights.checks import check_dtype, check_shape, list_modules, read_shape, read_whole
from edgelora_export.base.quantized.weights.codes import list_groups, scale_groups, unpack_bits
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgelora_export.base.quantized.weights.dequantized_tensors import Weight
    from edgelora_export.base.tensors import Tensors


@dataclass(frozen=True)
class AffineWeight:
    """A weight, or an embedding, of MLX. Satisfies Weight.

    weight: uint32 (N, K·bits/32). scales, biases: (N, G).
    """

    stored: Tensors
    shape: tuple[int, ...]
    parts: tuple[str, str, str]
    bits: int
    group_size: int

    def read_rows(self, start: int, stop: int) -> NDArray[np.float32]:
        words, scales, biases = (self.stored.read_rows(name, start, stop) for name in self.parts)
        groups = list_groups(self.shape[1], self.group_size)
        values = scale_groups(unpack_bits(words, self.bits, self.shape[1]), scales, None, groups)
        values += biases.astype(np.float32)[:, groups]
        return values


def find_weights(stored: Tensors, settings: Mapping[str, Any]) -> dict[str, Weight]:
    """Finds the weights that mlx-lm or transformers' MetalConfig stored. Settings may name single modules.

    Layout: https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html, and transformers'
    integrations/metal_quantization.py, where biases are called qbiases.
    Raises InputError for modes other than affine, and for tensors that contradict config.json.
    """
    found: dict[str, Weight] = {}
    for module in list_modules(stored, "scales"):
        own = settings.get(module)
        said = {**settings, **own} if isinstance(own, dict) else settings
        if (mode := said.get("mode", "affine")) != "affine":
            raise InputError(f"MLX's mode {mode!r} is not read, only affine")
        bits, size = read_whole(said, "bits"), read_whole(said, "group_size")
        if not 2 <= bits <= 8 or size < 1:
            raise InputError(
                f"quantization_config has bits = {bits} and group_size = {size} in config.json, which MLX does not have"
            )
        weight, scales = f"{module}.weight", f"{module}.scales"
        biases = next(
            (name for part in ("biases", "qbiases") if (name := f"{module}.{part}") in stored.files), f"{module}.biases"
        )
        rows, groups = read_shape(stored, scales, weight, dimensions=2)
        columns = groups * size
        reason = f"{scales} with {bits} bits in groups of {size}"
        check_shape(stored, weight, (rows, columns * bits // 32), reason=reason)
        check_shape(stored, biases, (rows, groups), reason=scales)
        check_dtype(stored, weight, np.uint32, scales)
        found[weight] = AffineWeight(stored, (rows, columns), (weight, scales, biases), bits, size)
    return found
