"""Deltas by blocks of rows: products in parts, blocks in threads, and results in order."""

from __future__ import annotations

import numpy as np
import pytest

from edgelora.mix.methods import deltas
from edgelora.mix.methods.deltas import Product, map_row_blocks, merge_row_blocks, row_blocks


@pytest.mark.parametrize("shape", [(1, 1), (40, 5000), (7, 70_000), (300, 2048)])
def test_a_product_of_any_width_is_formed_in_small_parts(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((3, shape[1]), np.float32), random.standard_normal((shape[0], 3), np.float32)
    widths = []
    multiply = np.matmul

    def watched(left: np.ndarray, right: np.ndarray, out: np.ndarray) -> np.ndarray:
        widths.append(left.size * right.shape[1])
        return multiply(left, right, out=out)

    monkeypatch.setattr(np, "matmul", watched)
    product = Product(a, b)[1:]
    np.testing.assert_allclose(product, b[1:] @ a, rtol=1e-5, atol=1e-6)
    assert max(widths) <= deltas._SINGLE_THREAD


def test_a_product_of_no_rows_is_empty() -> None:
    assert Product(np.ones((2, 5), np.float32), np.ones((4, 2), np.float32))[4:].shape == (0, 5)


def test_blocks_come_back_in_order() -> None:
    shape = (500, 4096)
    assert map_row_blocks(lambda rows: rows, shape) == [*row_blocks(shape)]
    matrix = np.random.default_rng(0).standard_normal(shape, np.float32)
    np.testing.assert_array_equal(merge_row_blocks(lambda parts: parts[0] - parts[1], [matrix, 2 * matrix]), -matrix)
