"""GPTQ as AutoGPTQ and GPTQModel store it: codes packed along the inputs, zero points along the outputs, any order of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.base.quantized.weights.checks import (
    check_dtype,
    check_order,
    check_shape,
    list_modules,
    read_shape,
    read_whole,
)
from edgelora_export.base.quantized.weights.codes import list_groups, scale_groups, unpack_bits
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgelora_export.base.quantized.weights.dequantized_tensors import Weight
    from edgelora_export.base.tensors import Tensors

# What is added to a stored zero point. The first version stores it less one.
_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_OVERRIDES = ("dynamic", "extra_config")  # settings of single modules: GPTQModel's and AutoRound's keys


@dataclass(frozen=True)
class GptqWeight:
    """A weight as its QuantLinear holds it. Satisfies Weight.

    qweight: int32 (K·bits/32, N). qzeros: int32 (G, N·bits/32). scales: (G, N). g_idx: the group of each input, (K,), or absent.
    """

    stored: Tensors
    module: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    bits: int
    offset: int
    group_size: int

    def read_rows(self, start: int, stop: int) -> NDArray[np.float32]:
        rows, columns = self.shape
        codes = unpack_bits(self._read("qweight")[:, start:stop].T, self.bits, columns)
        zeros = unpack_bits(self._read("qzeros"), self.bits, rows)[:, start:stop].T.astype(np.int16) + self.offset
        return scale_groups(codes, self._read("scales")[:, start:stop].T, zeros, self._read_groups())

    def _read(self, part: str) -> NDArray[Any]:
        return self.stored.read(f"{self.module}.{part}")

    def _read_groups(self) -> NDArray[np.intp]:
        name = f"{self.module}.g_idx"
        if name not in self.parts:
            return list_groups(self.shape[1], self.group_size)
        return self.stored.read(name).astype(np.intp)


def find_weights(stored: Tensors, settings: Mapping[str, Any]) -> dict[str, Weight]:
    """Finds the weights of 2 to 8 bits that a GPTQ checkpoint stores.

    Layout: https://github.com/AutoGPTQ/AutoGPTQ/blob/7c691ed/auto_gptq/nn_modules/qlinear/qlinear_cuda.py (pack).
    Raises InputError for another checkpoint_format, and for tensors that contradict each other or config.json.
    """
    form = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if form not in _OFFSETS:
        raise InputError(f"checkpoint_format = {form!r} is not read, only {' and '.join(_OFFSETS)}")
    return {
        f"{module}.weight": open_weight(stored, module, settings, _OFFSETS[form]) for module in list_modules(stored, "qweight")
    }


def open_weight(stored: Tensors, module: str, settings: Mapping[str, Any], offset: int) -> GptqWeight:
    """Finds the parts of one weight and checks them. offset: what is added to a stored zero point.

    Raises InputError for parts that contradict each other or config.json.
    """
    scales, codes, zeros, order = (f"{module}.{part}" for part in ("scales", "qweight", "qzeros", "g_idx"))
    groups, rows = read_shape(stored, scales, codes, dimensions=2)
    words, _ = read_shape(stored, codes, scales, dimensions=2)
    check_shape(stored, codes, (words, rows), reason=scales)
    for name in (codes, zeros):
        check_dtype(stored, name, np.int32, "GPTQ")
    bits, rest = divmod(read_shape(stored, zeros, codes, dimensions=2)[1] * 32, rows)
    if rest or not 2 <= bits <= 8 or words * 32 % bits:
        raise InputError(f"tensor {zeros} has the shape {list(stored.shape(zeros))}, which fits {scales} in no number of bits")
    columns = words * 32 // bits
    group_size = -(-columns // groups)
    if not any(settings.get(key) for key in _OVERRIDES):
        said = read_whole(settings, "bits")
        if bits != said:
            raise InputError(f"tensor {zeros} has {bits} bits, where config.json says {said}; download the base again")
        said = read_whole(settings, "group_size", 128)
        group_size = columns if said == -1 else said
    if group_size < 1 or groups != -(-columns // group_size):
        raise InputError(f"tensor {scales} has {groups} groups of {columns} inputs, where config.json says {group_size} in each")
    check_shape(stored, zeros, (groups, rows * bits // 32), reason=scales)
    parts = [codes, zeros, scales]
    if order in stored.files:
        check_order(stored, order, columns, groups)
        parts.append(order)
    elif settings.get("desc_act"):
        raise InputError(f"tensor {order} is missing, which desc_act in config.json needs; download the base again")
    return GptqWeight(stored, module, (rows, columns), tuple(parts), bits, offset, group_size)
