"""The one quantization grid of edgelora: integer codes with an fp32 scale per block along K.

The layout is MatMulNBits'
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits).
Byte j // 2 of a block holds code j, the even one in the low nibble. Without zero points, code 2^(bits-1) means 0.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Codes = NDArray[np.uint8]

BLOCK_SIZES = (16, 32, 64, 128, 256)
BITS = (4, 8)

# Step sizes tried per block, as a divisor of the block's largest magnitude. 8 puts the extreme on the end code without
# clipping. Smaller divisors give the opposite end more room; larger ones clip the extreme and make the steps finer.
DIVISORS = {4: (7.0, 7.5, 8.0, 8.5, 9.0), 8: (128.0,)}
# The same for search_grid, which runs once per column block and can afford more.
_FINE_DIVISORS = {4: tuple(np.arange(6.5, 10.25, 0.25)), 8: (127.0, 127.5, 128.0)}
_SHRINKS = {4: tuple(np.arange(1.0, 0.68, -0.04)), 8: (1.0,)}
CHUNK_ELEMENTS = 1 << 20  # weights that a thread rounds at once: its temporaries are a few MB, which bounds memory


@dataclass(frozen=True)
class Grid:
    """The values that a quantized weight can take.

    They are codes of 4 or 8 bits with a scale per block, with or without zero points.
    """

    bits: int
    block_size: int
    symmetric: bool = True

    def row_bytes(self, columns: int) -> int:
        """Returns the bytes of codes in one row of a weight, with the padding of its last block.

        >>> Grid(bits=4, block_size=32).row_bytes(70)
        48
        """
        return -(-columns // self.block_size) * self.block_size * self.bits // 8


@dataclass(frozen=True)
class BlockQuantized:
    """A weight (N, K) on the grid: w[n, k] ≈ (code - zero) * scale of its block.

    codes: uint8 (N, ceil(K / block_size), block_size * bits / 8), packed.
    scales: float32 (N, ceil(K / block_size)).
    zero_points: uint8 (N, ceil(ceil(K / block_size) * bits / 8)), packed, or None for 2^(bits-1) everywhere.
    """

    codes: Codes
    scales: Floats
    zero_points: Codes | None
    bits: int
    block_size: int
    columns: int

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.block_size, self.zero_points is None)

    def rows(self, chosen: NDArray[np.int64]) -> BlockQuantized:
        """Returns the chosen rows of the weight, in that order."""
        zeros = None if self.zero_points is None else self.zero_points[chosen]
        return BlockQuantized(self.codes[chosen], self.scales[chosen], zeros, self.bits, self.block_size, self.columns)

    def share_changed(self, other: BlockQuantized) -> float:
        """Returns the share of codes that differ from another weight's on the same grid.

        Padding does not count.
        """
        codes = [
            unpack_codes(matrix.codes, self.bits).reshape(len(self.codes), -1)[:, : self.columns] for matrix in (self, other)
        ]
        return float(np.mean(codes[0] != codes[1]))

    def dequantize(self) -> Floats:
        """Returns the float32 (N, K) matrix that these codes represent."""
        rows, blocks = self.scales.shape
        codes = unpack_codes(self.codes, self.bits).astype(np.float32)
        if self.zero_points is None:
            zero = np.full((rows, blocks, 1), 1 << (self.bits - 1), np.float32)
        else:
            zero = unpack_codes(self.zero_points, self.bits)[:, :blocks, None].astype(np.float32)
        weight = (codes - zero) * self.scales[:, :, None]
        return np.ascontiguousarray(weight.reshape(rows, -1)[:, : self.columns])


def stack_rows(parts: Iterator[BlockQuantized], rows: int) -> BlockQuantized:
    """Joins parts of a weight of that many rows, each with some of them, in order.

    All parts are on the same grid. Each is copied as it is made, so that an embedding is never in memory twice.
    """
    first = next(parts)
    if len(first.codes) == rows:
        return first
    codes, scales = (np.empty((rows, *of.shape[1:]), of.dtype) for of in (first.codes, first.scales))
    zeros = None if first.zero_points is None else np.empty((rows, *first.zero_points.shape[1:]), np.uint8)
    filled = 0
    for part in chain([first], parts):
        place = slice(filled, filled := filled + len(part.codes))
        codes[place], scales[place] = part.codes, part.scales
        if zeros is not None:
            zeros[place] = part.zero_points
    return BlockQuantized(codes, scales, zeros, first.bits, first.block_size, first.columns)


def pack_codes(codes: Codes, bits: int) -> Codes:
    """Packs uint8 codes (..., J) into (..., ceil(J * bits / 8)).

    An odd number of 4-bit codes is padded with a 0.

    >>> pack_codes(np.array([1, 2, 15], np.uint8), bits=4).tolist() == [0x21, 0x0F]
    True
    """
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def unpack_codes(packed: Codes, bits: int) -> Codes:
    """Unpacks bytes (..., J) into codes (..., J * 8 / bits). Inverts pack_codes.

    >>> unpack_codes(np.array([0x21, 0x0F], np.uint8), bits=4).tolist()
    [1, 2, 15, 0]
    """
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    codes[..., 0::2] = packed & 0x0F
    codes[..., 1::2] = packed >> np.uint8(4)
    return codes


def check_grid(bits: int, block_size: int) -> None:
    """Raises InputError for a grid that MatMulNBits cannot run."""
    if bits not in BITS:
        raise InputError(f"bits = {bits}: the grid has 4 or 8 bits (32 leaves weights in float32)")
    if block_size not in BLOCK_SIZES:
        raise InputError(f"block_size = {block_size}: use one of {', '.join(map(str, BLOCK_SIZES))}")


def quantize_rtn(
    weight: Floats, *, bits: int = 4, block_size: int = 32, symmetric: bool = True, chunk_elements: int = CHUNK_ELEMENTS
) -> BlockQuantized:
    """Rounds a weight to the nearest codes, block by block.

    Each block has the step of least squared error. weight: float32 (N, K), finite. K need not be a multiple of block_size: the
    last block is padded with zeros. chunk_elements: weights that a thread rounds at once. Raises InputError for an impossible
    grid and for NaN or infinity.

    >>> matrix = quantize_rtn(np.array([[1.0, -0.5, 0.25, 0.125]], np.float32), block_size=16)
    >>> unpack_codes(matrix.codes, bits=4)[0, 0, :4].tolist()
    [0, 12, 6, 7]
    >>> matrix.scales.tolist()
    [[-0.125]]
    >>> matrix.dequantize().tolist()
    [[1.0, -0.5, 0.25, 0.125]]
    """
    check_grid(bits, block_size)
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    codes = np.empty((rows, blocks, block_size * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zeros = None if symmetric else np.empty((rows, blocks), np.uint8)
    round_blocks = _round_symmetric if symmetric else _round_asymmetric

    def quantize_rows(start: int) -> None:
        stop = min(start + step, rows)
        padded = np.zeros((stop - start, blocks * block_size), np.float32)
        padded[:, :columns] = weight[start:stop]
        if not np.isfinite(padded).all():
            raise InputError("the weight holds NaN or infinity; it cannot be quantized: check the base and the adapters")
        code, scale, zero = round_blocks(padded.reshape(stop - start, blocks, block_size), bits)
        codes[start:stop] = pack_codes(code, bits)
        scales[start:stop] = scale
        if zeros is not None:
            zeros[start:stop] = zero

    step = max(1, chunk_elements // (blocks * block_size))
    with ThreadPoolExecutor() as pool:  # numpy releases the GIL
        list(pool.map(quantize_rows, range(0, rows, step)))
    packed_zeros = None if zeros is None else pack_codes(zeros, bits)
    return BlockQuantized(codes, scales, packed_zeros, bits, block_size, columns)


def search_grid(block: Floats, importance: Floats, *, bits: int, symmetric: bool) -> tuple[Floats, Codes]:
    """Finds the scales and zero points that round one block of columns with the least weighted error.

    block: float32 (N, block_size). importance: float32 (block_size,), the weight of each column's squared error. Returns scales
    float32 (N,) and zero points uint8 (N,).
    """
    top = (1 << bits) - 1
    if symmetric:
        half = 1 << (bits - 1)
        extreme = np.take_along_axis(block, np.abs(block).argmax(axis=1)[:, None], axis=1)[:, 0]
        choices = [(extreme / np.float32(-divisor), np.full(len(block), half, np.float32)) for divisor in _FINE_DIVISORS[bits]]
    else:
        low, high = np.minimum(block.min(axis=1), 0), np.maximum(block.max(axis=1), 0)
        choices = []
        for shrink in _SHRINKS[bits]:
            scale = (high / np.float32(top) - low / np.float32(top)) * np.float32(shrink)
            choices.append((scale, np.clip(np.rint(-low * np.float32(shrink) * _invert(scale)), 0, top)))
    best_scale, best_zero = choices[0]
    best_error = np.full(len(block), np.inf, np.float32)
    weights = importance if importance.any() else np.ones_like(importance)
    for scale, zero in choices:
        codes = np.clip(np.rint(block * _invert(scale)[:, None]) + zero[:, None], 0, top)
        residual = (codes - zero[:, None]) * scale[:, None] - block
        error = np.square(residual) @ weights
        better = error < best_error
        best_scale, best_zero = np.where(better, scale, best_scale), np.where(better, zero, best_zero)
        best_error = np.minimum(error, best_error)
    return best_scale.astype(np.float32), best_zero.astype(np.uint8)


def _round_symmetric(blocks: Floats, bits: int) -> tuple[Codes, Floats, Codes]:
    """Returns uint8 codes, scales and constant zero points for blocks (R, C, block_size)."""
    half = 1 << (bits - 1)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[:, :, None], axis=2)
    best_codes = np.zeros(blocks.shape, np.float32)
    best_scale = np.zeros(extreme.shape, np.float32)
    best_error = np.full(extreme.shape, np.inf, np.float32)
    unit = blocks * _invert(extreme)  # errors are compared in units of the extreme, whose square cannot overflow
    for divisor in DIVISORS[bits]:
        # The sign sends the extreme to code 0, the end that reaches further: codes run from -half to half - 1.
        codes = np.clip(np.rint(unit * np.float32(-divisor)), -half, half - 1)
        residual = codes * np.float32(-1 / divisor) - unit
        error = np.einsum("rcb,rcb->rc", residual, residual)[:, :, None]
        better = error < best_error
        np.copyto(best_codes, codes, where=better)
        np.copyto(best_scale, extreme / np.float32(-divisor), where=better)
        np.copyto(best_error, error, where=better)
    zero = np.full(best_scale.shape[:2], half, np.uint8)
    return (best_codes + half).astype(np.uint8), best_scale[:, :, 0], zero


def _round_asymmetric(blocks: Floats, bits: int) -> tuple[Codes, Floats, Codes]:
    """Returns uint8 codes, scales and zero points for blocks (R, C, block_size).

    0 is always in the range.
    """
    top = (1 << bits) - 1
    low = np.minimum(blocks.min(axis=2, keepdims=True), 0)
    high = np.maximum(blocks.max(axis=2, keepdims=True), 0)
    scale = high / np.float32(top) - low / np.float32(top)  # divided first, because high - low can overflow
    inverse = _invert(scale)
    zero = np.clip(np.rint(-low * inverse), 0, top)
    codes = np.clip(np.rint(blocks * inverse) + zero, 0, top)
    return codes.astype(np.uint8), scale[:, :, 0], zero[:, :, 0].astype(np.uint8)


def _invert(values: Floats) -> Floats:
    """Returns 1 / values, or 0 where a value is 0 or so small that the inverse would overflow."""
    inverse: Floats = np.divide(1.0, values, out=np.zeros_like(values), where=np.abs(values) >= np.finfo(np.float32).tiny)
    return inverse
