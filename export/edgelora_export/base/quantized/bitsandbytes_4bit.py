"""bitsandbytes in 4 bits: NF4 and FP4 in blocks of the flattened weight, the blocks' scales in float32 or quantized once more."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from edgelora_export.base.quantized.weights.checks import check_dtype, check_shape, read_shape
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgelora_export.base.quantized.weights.dequantized_tensors import Weight
    from edgelora_export.base.tensors import Tensors

_STATE = ".quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class _Nested:
    """Scales in 8 bits: code of the table × nested scale of the block + offset."""

    block: int
    offset: float


@dataclass(frozen=True)
class Weight4bit:
    """A weight of Linear4bit. Satisfies Weight.

    Its elements lie row after row, two in a byte, the first in the upper half. block: elements that share a scale. dtype: what
    bitsandbytes rounds the values to, as in training.
    """

    stored: Tensors
    name: str
    shape: tuple[int, ...]
    kind: str
    block: int
    dtype: np.dtype[Any]
    nested: _Nested | None

    @property
    def parts(self) -> tuple[str, ...]:
        more = (".nested_absmax", ".nested_quant_map") if self.nested else ()
        return tuple(self.name + part for part in ("", ".absmax", ".quant_map", f"{_STATE}{self.kind}", *more))

    def read_rows(self, start: int, stop: int) -> NDArray[np.float32]:
        row = prod(self.shape[1:])
        first, last = start * row // self.block, -(-stop * row // self.block)
        begin, end = first * self.block, min(last * self.block, prod(self.shape))
        unit = 2 * self.stored.dtype(self.name).itemsize  # elements in a stored number, which need not be a byte
        packed = self.stored.read_rows(self.name, begin // unit, -(-end // unit)).reshape(-1).view(np.uint8)
        table = self.stored.read(f"{self.name}.quant_map").astype(np.float32)
        pairs = np.stack((np.repeat(table, 16), np.tile(table, 16)), axis=1)  # the two elements of each byte
        values: NDArray[np.float32] = pairs[packed].reshape(-1)[: end - begin]
        values *= np.repeat(self._read_scales(first, last), self.block)[: end - begin]
        values = values[start * row - begin : stop * row - begin].reshape(-1, *self.shape[1:])
        return values.astype(self.dtype).astype(np.float32)

    def _read_scales(self, first: int, last: int) -> NDArray[np.float32]:
        scales = self.stored.read(f"{self.name}.absmax").reshape(-1)[first:last]
        if self.nested is None:
            return scales.astype(np.float32)
        table = self.stored.read(f"{self.name}.nested_quant_map").astype(np.float32)
        outer = self.stored.read(f"{self.name}.nested_absmax").astype(np.float32)
        values: NDArray[np.float32] = table[scales] * outer[np.arange(first, last) // self.nested.block]
        return values + np.float32(self.nested.offset)


def find_weights(stored: Tensors, _settings: Mapping[str, Any]) -> dict[str, Weight]:
    """Finds the weights that Linear4bit stored.

    Layout: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/20e1677/bitsandbytes/functional.py (QuantState.as_dict).
    Raises InputError if a tensor contradicts its quantization state.
    """
    found: dict[str, Weight] = {}
    for kind in _TYPES:
        for state in [name for name in stored.files if name.endswith(_STATE + kind)]:
            name = state.removesuffix(_STATE + kind)
            found[name] = _open_weight(stored, name, state, kind)
    return found


def _open_weight(stored: Tensors, name: str, state: str, kind: str) -> Weight4bit:
    try:
        values = json.loads(stored.read(state).tobytes())
        shape = tuple(int(size) for size in values["shape"])
        block, dtype = int(values["blocksize"]), _DTYPES[values["dtype"]]
        nested = None
        if "nested_blocksize" in values:
            nested = _Nested(int(values["nested_blocksize"]), float(values["nested_offset"]))
        held = values["quant_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"tensor {state} is not a quantization state of bitsandbytes ({error!r})") from error
    sizes = (*shape, block, nested.block if nested else 1)
    if held != kind or not shape or min(sizes) < 1 or block % 8 or not isfinite(nested.offset if nested else 0):
        raise InputError(f"tensor {state} holds a quantization state that bitsandbytes does not write: {values}")
    count = prod(shape)
    blocks = -(-count // block)
    reason = f"its state ({list(shape)} in blocks of {block})"
    read_shape(stored, name, reason)
    numbers = -(-count // (2 * stored.dtype(name).itemsize))
    check_shape(stored, name, (numbers, 1), (numbers,), reason=reason)
    check_shape(stored, f"{name}.absmax", (blocks,), reason=reason)
    check_shape(stored, f"{name}.quant_map", (16,), reason=reason)
    if nested:
        check_shape(stored, f"{name}.nested_absmax", (-(-blocks // nested.block),), reason=reason)
        check_shape(stored, f"{name}.nested_quant_map", (256,), reason=reason)
    check_dtype(stored, f"{name}.absmax", np.uint8 if nested else np.float32, state)
    return Weight4bit(stored, name, shape, kind, block, dtype, nested)
