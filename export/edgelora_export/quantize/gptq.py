"""GPTQ on edgelora's one grid: codes that offset each other's rounding errors on real inputs.

Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1: columns are rounded in order, and the rounding error of each is spread over
the columns that follow, by the inverse of the inputs' second moments. Codes and scales are written as they were computed. Columns
keep their order, so the graph needs no g_idx, which would take MatMulNBits off its fast path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.quantize.descent import SWEEPS, refine_codes
from edgelora_export.quantize.int4 import BlockQuantized, check_grid, pack_codes, search_grid, stack_rows
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

DAMPING = 0.01  # of the mean diagonal, as in the paper (section 3.3, step 3)
_BATCH = 128  # columns between two updates of all that follow: the paper's lazy batches
_ROWS = 8192  # of a weight, or of inputs, at once; bounds the memory that a head of 128k rows needs
_RIDGE = 1e-13  # of the trace, so that float64 can factor moments of less than full rank
_DOUBLE_LIMIT = 4096  # columns; up to here float64 costs little time and memory


def quantize_gptq(
    weight: Floats,
    moments: Floats,
    *,
    bits: int = 4,
    block_size: int = 32,
    symmetric: bool = True,
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
) -> BlockQuantized:
    """Quantizes a weight so that its outputs change least on inputs like the calibration's.

    See Compensator.
    """
    compensator = Compensator(moments, damping)
    return compensator.quantize(weight, bits=bits, block_size=block_size, symmetric=symmetric, sweeps=sweeps)


class Compensator:
    """A quantizer for weights of one input width.

    It factors the inputs' second moments once, and parts of a weight can share it.

    moments: float32 (K, K), Σ xᵀx over the calibration inputs (T, K), up to a positive factor. damping: added to the moments'
    diagonal, in units of its mean. Raises InputError for NaN or infinity.
    """

    def __init__(self, moments: Floats, damping: float = DAMPING) -> None:
        _check_moments(moments)
        self._moments = moments
        self._importance = np.diag(moments).copy()
        self._damping = damping * float(np.where(self._importance > 0, self._importance, 1).mean())
        self._factor = _inverse_factor(moments, damping)

    def quantize(
        self, weight: Floats, *, bits: int = 4, block_size: int = 32, symmetric: bool = True, sweeps: int = SWEEPS
    ) -> BlockQuantized:
        """Quantizes a weight float32 (N, K).

        Columns whose inputs are always 0 are rounded to nearest. sweeps: how often the descent then goes over all columns
        (descent.py). 0 is the paper's GPTQ. Raises InputError for an impossible grid, for NaN or infinity, and for a weight whose
        width is not the moments'.
        """
        check_grid(bits, block_size)
        columns = weight.shape[1]
        if columns != len(self._factor):
            width = len(self._factor)
            raise InputError(f"moments have shape ({width}, {width}); a weight of {columns} columns needs ({columns}, {columns})")
        if not np.isfinite(weight).all():
            raise InputError("the weight holds NaN or infinity; check the base and the adapters")

        def quantize_rows(rows: Floats) -> BlockQuantized:
            matrix = _quantize_rows(rows, self._factor, self._importance, bits, block_size, symmetric)
            return refine_codes(rows, matrix, self._moments, self._damping, sweeps)

        parts = (weight[start : start + _ROWS] for start in range(0, len(weight), _ROWS))
        return stack_rows(map(quantize_rows, parts), len(weight))


def _quantize_rows(
    weight: Floats, factor: Floats, importance: Floats, bits: int, block_size: int, symmetric: bool
) -> BlockQuantized:
    """Quantizes some rows of a weight. Rows do not affect each other."""
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    width = blocks * block_size
    # The weight is transposed: a column is then one contiguous row, and an update one product.
    left = np.zeros((width, rows), np.float32)
    left[:columns] = weight.T
    padded = np.zeros(width, np.float32)
    padded[:columns] = importance
    top = (1 << bits) - 1
    codes = np.empty((width, rows), np.uint8)
    scales, zeros = np.empty((blocks, rows), np.float32), np.empty((blocks, rows), np.uint8)
    batch = max(_BATCH, block_size)
    for start in range(0, width, batch):
        stop = min(start + batch, width)
        errors = np.zeros((stop - start, rows), np.float32)
        for first in range(start, stop, block_size):
            block = first // block_size
            last = first + block_size
            scale, zero = search_grid(left[first:last].T, padded[first:last], bits=bits, symmetric=symmetric)
            scales[block], zeros[block] = scale, zero
            inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
            for column in range(first, last):
                code = np.clip(np.rint(left[column] * inverse) + zero, 0, top)
                codes[column] = code
                if column >= columns:
                    continue
                error = (left[column] - (code - zero) * scale) / factor[column, column]
                errors[column - start] = error
                ahead = min(last, columns)
                left[column + 1 : ahead] -= factor[column, column + 1 : ahead, None] * error
            ahead = min(stop, columns)  # the rest of the batch, because its scales are searched next
            if last < ahead:
                left[last:ahead] -= factor[first:last, last:ahead].T @ errors[first - start : last - start]
        if stop < columns:
            left[stop:columns] -= factor[start:stop, stop:].T @ errors
    packed = pack_codes(np.ascontiguousarray(codes.T).reshape(rows, blocks, block_size), bits)
    packed_zeros = None if symmetric else pack_codes(np.ascontiguousarray(zeros.T), bits)
    return BlockQuantized(packed, np.ascontiguousarray(scales.T), packed_zeros, bits, block_size, columns)


def output_error(difference: Floats, inputs: Floats) -> float:
    """Returns ‖X·Eᵀ‖², the squared output error of a weight's error E (N, K) on inputs X (T, K).

    Opposite errors cancel where their inputs are equal, which is what GPTQ uses:

    >>> output_error(np.array([[1, -1]], np.float32), np.array([[3, 3], [2, 0]], np.float32))
    4.0
    """
    return float(
        sum(
            np.square(inputs @ rows.T).sum(dtype=np.float64)
            for rows in np.split(difference, range(_ROWS, len(difference), _ROWS))
        )
    )


def shorten_inputs(inputs: Floats, rows: int) -> Floats:
    """Returns fewer inputs that give every weight of that many rows the same output error.

    They are R (K, K) with RᵀR = XᵀX, so that ‖R·Eᵀ‖ = ‖X·Eᵀ‖. In float64 the product keeps what float32 inputs hold. Inputs are
    returned as they are where finding R costs more than it saves. Raises InputError for NaN or infinity.
    """
    tokens, columns = inputs.shape
    if columns >= min(tokens, rows):
        return inputs
    moments = np.zeros((columns, columns))
    for start in range(0, tokens, _ROWS):
        wide = inputs[start : start + _ROWS].astype(np.float64)
        moments += wide.T @ wide
    _check_moments(moments)
    moments[np.diag_indices(columns)] += _RIDGE * max(np.trace(moments), 1e-30)  # inputs may be all 0
    factor: Floats = np.linalg.cholesky(moments).T.astype(np.float32)
    return factor


def _check_moments(moments: NDArray[Any]) -> None:
    if not np.isfinite(moments).all():
        raise InputError("the calibration inputs hold NaN or infinity; check the base and the adapters")


def _inverse_factor(moments: Floats, damping: float) -> Floats:
    """Returns the upper triangular U with UᵀU = (moments + damping)⁻¹, float32 (K, K).

    The inverse itself is never formed. Reversing rows and columns turns the Cholesky factor L of the moments into an upper R with
    R·Rᵀ = moments: U = R⁻¹.
    """
    import torch

    columns = len(moments)
    kind = torch.float64 if columns <= _DOUBLE_LIMIT else torch.float32
    matrix = torch.from_numpy(np.ascontiguousarray(moments[::-1, ::-1])).to(kind)
    diagonal = matrix.diagonal()
    diagonal[diagonal <= 0] = 1  # inputs that are always 0: their errors cost nothing, and they cannot make up for others
    mean = float(diagonal.mean())
    added = 0.0
    for share in (damping, 10 * damping, 100 * damping):
        diagonal.add_((share - added) * mean)
        added = share
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            break
    else:
        raise InputError("the calibration inputs' second moments are not positive definite; give more or other calibration rows")
    del matrix, diagonal
    inverse = torch.linalg.solve_triangular(lower, torch.eye(columns, dtype=kind), upper=False)
    # R = reversed L, so R⁻¹ = reversed L⁻¹.
    return np.ascontiguousarray(inverse.numpy()[::-1, ::-1], np.float32)
