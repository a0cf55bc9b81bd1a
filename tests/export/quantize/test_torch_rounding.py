"""Rounding in torch gives the very values of quantize_rtn, whatever the shape and whatever the numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgelora_export.quantize.int4 import quantize_rtn
from edgelora_export.quantize.torch_rounding import round_to_int4

SHAPES = [(1, 1), (7, 31), (16, 32), (5, 172), (300, 96), (1024, 288)]  # the last is rounded in two chunks


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-30, 0.02, 1.0, 1e20])
def test_values_are_those_of_export(shape: tuple[int, int], size: float) -> None:
    weight = np.random.default_rng(0).normal(0, size, shape).astype(np.float32)
    weight[0, :] = 0  # a block of zeros
    weight[-1, 0] = 9 * size  # a block with an outlier
    found = round_to_int4(torch.from_numpy(weight)).numpy()
    assert found.shape == shape
    np.testing.assert_array_equal(found, quantize_rtn(weight).dequantize())


def test_result_has_no_gradient() -> None:
    weight = torch.randn(4, 32, requires_grad=True)
    assert not round_to_int4(weight).requires_grad
