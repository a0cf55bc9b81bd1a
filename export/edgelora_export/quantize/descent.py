"""Coordinate descent over the codes and scales that GPTQ leaves.

Each code, and each block's scale, gets the value with the least output error. GPTQ rounds each column once, before it knows how
later columns will be rounded. Going over the columns again, with all others fixed, is QuantEase (Behdin et al., arXiv 2309.01885,
section 3). The scale of a block is fitted in the same way: with the codes fixed, its best value has a closed form. No step raises
the error of the outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelora_export.quantize.int4 import BlockQuantized, pack_codes, unpack_codes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

SWEEPS = 2  # over all columns; docs/log.md has the figures
_BATCH = 128  # columns between two products with the errors of all columns


def refine_codes(weight: Floats, matrix: BlockQuantized, moments: Floats, damping: float, sweeps: int = SWEEPS) -> BlockQuantized:
    """Refines the codes and scales of a quantized weight to reduce its output error.

    Zero points do not change.

    weight: float32 (N, K), which `matrix` approximates. moments: float32 (K, K), Σ xᵀx over inputs (T, K). damping: added to
    their diagonal, more than 0.
    """
    (rows, columns), size = weight.shape, matrix.block_size
    blocks = matrix.scales.shape[1]
    top = (1 << matrix.bits) - 1
    # All arrays are transposed: a column is then one contiguous row.
    wanted = np.ascontiguousarray(weight.T)
    scales = np.ascontiguousarray(matrix.scales.T)
    zeros = np.full_like(scales, 1 << (matrix.bits - 1))
    if matrix.zero_points is not None:
        zeros[:] = unpack_codes(matrix.zero_points, matrix.bits)[:, :blocks].T
    codes = unpack_codes(matrix.codes, matrix.bits).reshape(rows, -1).copy()  # 8-bit codes are the matrix's own
    levels = np.ascontiguousarray(codes.T[:columns]) - np.repeat(zeros, size, axis=0)[:columns]
    errors = wanted - levels * np.repeat(scales, size, axis=0)[:columns]
    batch = max(_BATCH, size)
    for start in [*range(0, columns, batch)] * sweeps:
        stop = min(start + batch, columns)
        near = moments[start:stop, start:stop].copy()
        near[np.diag_indices(stop - start)] += damping
        # (moments + damping) @ errors: minus half the gradient of the output error, kept up to date for this batch only.
        slope: Floats = moments[start:stop] @ errors
        slope += damping * errors[start:stop]
        for first in range(start, stop, size):
            block, last = first // size, min(first + size, stop)
            inside, behind = slice(first - start, last - start), slice(last - start, stop - start)
            level = levels[first:last]
            _fit_scale(level, scales[block], errors[first:last], slope, near[:, inside], inside)
            settled = errors[first:last].copy()
            inverse = np.divide(1, scales[block], out=np.zeros_like(scales[block]), where=scales[block] != 0)
            for column in range(last - first):
                at = first - start + column
                best = wanted[first + column] - errors[first + column] + slope[at] / near[at, at]
                level[column] = np.clip(np.rint(best * inverse), -zeros[block], top - zeros[block])
                change = wanted[first + column] - level[column] * scales[block] - errors[first + column]
                errors[first + column] += change
                slope[inside] += near[inside, at, None] * change
            slope[behind] += near[behind, inside] @ (errors[first:last] - settled)
    codes[:, :columns] = (levels + np.repeat(zeros, size, axis=0)[:columns]).T
    packed = pack_codes(codes.reshape(rows, blocks, size), matrix.bits)
    return BlockQuantized(packed, np.ascontiguousarray(scales.T), matrix.zero_points, matrix.bits, size, columns)


def _fit_scale(level: Floats, scale: Floats, errors: Floats, slope: Floats, near: Floats, inside: slice) -> None:
    """Sets a block's scales (N,) to their best values for its levels (block, N).

    Works in place, and updates errors and slope to match. near: the damped moments of the batch's columns with the block's
    columns, float32 (batch, block).
    """
    bend = (level * (near[inside] @ level)).sum(axis=0)
    gain = np.divide((level * slope[inside]).sum(axis=0), bend, out=np.zeros_like(bend), where=bend > 0)
    scale += gain
    moved = level * gain
    errors -= moved
    slope -= near @ moved
