"""AWQ as AutoAWQ stores it: gemm, packed along the outputs in an order of its own, and gemv, packed along the inputs."""

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

_BITS = 4
_PACK = 8  # codes in a word
# gemm: the place in its word that holds each of eight neighbouring outputs; the inverse of 0, 2, 4, 6, 1, 3, 5, 7
_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])


@dataclass(frozen=True)
class GemmWeight:
    """A weight of WQLinear_GEMM. Satisfies Weight.

    qweight: int32 (K, N/8). qzeros: int32 (G, N/8). scales: (G, N).
    """

    stored: Tensors
    module: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    group_size: int

    def read_rows(self, start: int, stop: int) -> NDArray[np.float32]:
        first, last = start // _PACK, -(-stop // _PACK)
        inside = slice(start - first * _PACK, stop - first * _PACK)
        codes, zeros = (self._unpack(part, first, last)[:, inside].T for part in ("qweight", "qzeros"))
        scales = self.stored.read(f"{self.module}.scales")[:, start:stop].T
        return scale_groups(codes, scales, zeros, list_groups(self.shape[1], self.group_size))

    def _unpack(self, part: str, first: int, last: int) -> NDArray[np.uint8]:
        words = self.stored.read(f"{self.module}.{part}")[:, first:last]
        codes = unpack_bits(words, _BITS, words.shape[1] * _PACK)
        return codes.reshape(len(words), -1, _PACK)[..., _PLACES].reshape(len(words), -1)


@dataclass(frozen=True)
class GemvWeight:
    """A weight of WQLinear_GEMV. Satisfies Weight.

    qweight: int32 (N, K/8). qzeros: int32 (N, W) with 8·W ≥ G. scales: (N, 8·W).
    """

    stored: Tensors
    module: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    group_size: int

    def read_rows(self, start: int, stop: int) -> NDArray[np.float32]:
        codes, zeros, scales = (self.stored.read_rows(name, start, stop) for name in self.parts)
        columns = self.shape[1]
        groups = list_groups(columns, self.group_size)
        return scale_groups(unpack_bits(codes, _BITS, columns), scales, unpack_bits(zeros, _BITS, groups[-1] + 1), groups)


def find_weights(stored: Tensors, settings: Mapping[str, Any]) -> dict[str, Weight]:
    """Finds the weights that an AWQ checkpoint stores.

    Layouts: https://github.com/casper-hansen/AutoAWQ/blob/df0a795/awq/modules/linear/gemm.py and gemv.py (from_linear).
    Raises InputError for another version, and for tensors that contradict each other or config.json.
    """
    version = str(settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm").lower()
    openers = {"gemm": open_gemm, "gemv": open_gemv}
    if version not in openers:
        raise InputError(f"AWQ of version {version!r} is not read, only {' and '.join(openers)}")
    bits = read_whole(settings, "bits" if "bits" in settings else "w_bit", _BITS)
    if bits != _BITS:
        raise InputError(f"AWQ of {bits} bits is not read, only of {_BITS}")
    size = read_whole(settings, "group_size" if "group_size" in settings else "q_group_size", 128)
    return {f"{module}.weight": openers[version](stored, module, size) for module in list_modules(stored, "qweight")}


def open_gemm(stored: Tensors, module: str, group_size: int) -> Weight:
    """Finds the parts of a weight in the layout gemm. group_size: inputs that share a scale, or -1 for all.

    Raises InputError for parts that do not fit.
    """
    codes, zeros, scales = parts = _name_parts(stored, module)
    columns, words = read_shape(stored, codes, scales, dimensions=2)
    size, groups = _count_groups(columns, group_size)
    check_shape(stored, scales, (groups, words * _PACK), reason=f"{codes} in groups of {size}")
    check_shape(stored, zeros, (groups, words), reason=f"{codes} in groups of {size}")
    return GemmWeight(stored, module, (words * _PACK, columns), parts, size)


def open_gemv(stored: Tensors, module: str, group_size: int) -> Weight:
    """Finds the parts of a weight in the layout gemv, as open_gemm."""
    codes, zeros, scales = parts = _name_parts(stored, module)
    rows, words = read_shape(stored, codes, scales, dimensions=2)
    size, groups = _count_groups(words * _PACK, group_size)
    _, width = read_shape(stored, zeros, codes, dimensions=2)
    if width * _PACK < groups:
        raise InputError(f"tensor {zeros} holds {width * _PACK} groups, where {codes} in groups of {size} has {groups}")
    check_shape(stored, zeros, (rows, width), reason=codes)
    check_shape(stored, scales, (rows, width * _PACK), reason=zeros)
    return GemvWeight(stored, module, (rows, words * _PACK), parts, size)


def _name_parts(stored: Tensors, module: str) -> tuple[str, str, str]:
    codes, zeros, scales = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    for name in (codes, zeros):
        check_dtype(stored, name, np.int32, "AWQ")
    return codes, zeros, scales


def _count_groups(columns: int, group_size: int) -> tuple[int, int]:
    size = columns if group_size == -1 else group_size
    if size < 1:
        raise InputError(f"quantization_config has group_size = {group_size} in config.json, which is not 1 or more")
    return size, -(-columns // size)
