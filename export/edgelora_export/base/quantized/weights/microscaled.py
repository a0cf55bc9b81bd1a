"""Weights in FP4 or FP6 with a scale for each small group of columns: NVFP4, MXFP4 and MXFP6 of linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelora_export.base.quantized.weights.checks import check_dtype, check_shape, read_shape
from edgelora_export.base.quantized.weights.codes import E2M1, E2M3, decode_exponents, list_groups, scale_groups, unpack_bits
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgelora_export.base.tensors import Tensors

_MAGNITUDES = {4: E2M1, 6: E2M3}


@dataclass(frozen=True)
class MicroscaledWeight:
    """A weight of small floats. Satisfies Weight.

    packed: uint8 (N, K·bits/8), the first code in the lowest bits, the sign in a code's highest. scale: float8 or exponents,
    (N, G). overall: the name of a factor for the whole tensor, or None. divide: whether that factor divides.
    """

    stored: Tensors
    packed: str
    scale: str
    overall: str | None
    divide: bool
    shape: tuple[int, ...]
    bits: int
    group_size: int

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.packed, self.scale) if self.overall is None else (self.packed, self.scale, self.overall)

    def read_rows(self, start: int, stop: int) -> NDArray[np.float32]:
        magnitudes = _MAGNITUDES[self.bits]
        table = np.concatenate((magnitudes, -magnitudes))
        codes = unpack_bits(self.stored.read_rows(self.packed, start, stop), self.bits, self.shape[1])
        scales = decode_exponents(self.stored.read_rows(self.scale, start, stop)).astype(np.float32)
        if self.overall is not None:
            overall = self.stored.read(self.overall).astype(np.float32).reshape(1, 1)
            scales = scales / overall if self.divide else scales * overall
        return scale_groups(table[codes], scales, None, list_groups(self.shape[1], self.group_size))


def open_microscaled(
    stored: Tensors, packed: str, scale: str, overall: str | None, *, group_size: int, divide: bool = False
) -> MicroscaledWeight:
    """Finds the parts of a weight of small floats.

    group_size: columns that share a scale, 16 in NVFP4 and 32 in the MX formats.
    Raises InputError for parts that do not fit.
    """
    rows, octets = read_shape(stored, packed, scale, dimensions=2)
    _, groups = read_shape(stored, scale, packed, dimensions=2)
    columns = groups * group_size
    check_shape(stored, scale, (rows, groups), reason=packed)
    bits, rest = divmod(octets * 8, columns or 1)
    if rest or bits not in _MAGNITUDES:
        raise InputError(f"tensor {packed} has {octets} bytes in a row, which {scale} fits neither in 4 nor in 6 bits")
    check_dtype(stored, packed, np.uint8, scale)
    if overall is not None:
        check_shape(stored, overall, (), (1,), reason=packed)
    return MicroscaledWeight(stored, packed, scale, overall, divide, (rows, columns), bits, group_size)
