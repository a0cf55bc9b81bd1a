"""Descent after GPTQ: no row's error rises, and in the end no change of a single code lowers it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgelora_export.quantize.descent import refine_codes
from edgelora_export.quantize.gptq import DAMPING, quantize_gptq
from edgelora_export.quantize.int4 import BlockQuantized, quantize_rtn, unpack_codes
from tests.export.quantize.test_gptq import GRIDS, make_case

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]


def damp(moments: NDArray[np.float32]) -> tuple[Doubles, float]:
    """The moments with GPTQ's damping, in float64; and the damping."""
    damping = DAMPING * float(np.diag(moments).mean())
    return moments.astype(np.float64) + damping * np.eye(len(moments)), damping


def row_errors(matrix: BlockQuantized, weight: NDArray[np.float32], damped: Doubles) -> Doubles:
    """E·H·Eᵀ of each row, float64 (N,)."""
    errors = matrix.dequantize().astype(np.float64) - weight
    return np.asarray(((errors @ damped) * errors).sum(axis=1))


@pytest.mark.parametrize(("bits", "symmetric", "block_size"), GRIDS)
@pytest.mark.parametrize("columns", [256, 300, 100])
@pytest.mark.parametrize("start", [quantize_gptq, quantize_rtn])
def test_no_row_gets_worse_and_all_together_get_better(
    bits: int, symmetric: bool, block_size: int, columns: int, start: object
) -> None:
    weight, moments, _ = make_case(32, columns)
    damped, damping = damp(moments)
    if start is quantize_gptq:
        before = quantize_gptq(weight, moments, bits=bits, block_size=block_size, symmetric=symmetric, sweeps=0)
    else:
        before = quantize_rtn(weight, bits=bits, block_size=block_size, symmetric=symmetric)
    codes = before.codes.copy()
    after = refine_codes(weight, before, moments, damping)
    np.testing.assert_array_equal(before.codes, codes)
    old, new = (row_errors(matrix, weight, damped) for matrix in (before, after))
    assert (new <= old * 1.001).all()
    assert new.sum() < 0.97 * old.sum()
    assert after.grid == before.grid
    assert after.codes.shape == before.codes.shape


@pytest.mark.parametrize("symmetric", [True, False])
def test_in_the_end_no_change_of_a_code_lowers_the_error(symmetric: bool) -> None:
    weight, moments, _ = make_case(6, 96)
    damped, damping = damp(moments)
    before = quantize_rtn(weight, symmetric=symmetric)
    settled = refine_codes(weight, before, moments, damping, sweeps=60)
    least = row_errors(settled, weight, damped)
    codes = unpack_codes(settled.codes, 4).reshape(6, -1).astype(int)
    values, scales = settled.dequantize().astype(np.float64), np.repeat(settled.scales, 32, axis=1)
    for column in range(96):
        for step in (-1, 1):
            changed = values.copy()
            possible = (codes[:, column] + step >= 0) & (codes[:, column] + step <= 15)
            changed[:, column] += np.where(possible, step * scales[:, column], 0)
            errors = changed - weight
            assert (((errors @ damped) * errors).sum(axis=1) >= least * (1 - 1e-4)).all()


def test_zero_weights_stay_zero() -> None:
    zeros = np.zeros((4, 64), np.float32)
    refined = refine_codes(zeros, quantize_rtn(zeros), np.eye(64, dtype=np.float32), 0.1)
    assert not refined.dequantize().any()
    assert np.isfinite(refined.scales).all()
