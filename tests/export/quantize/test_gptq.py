"""GPTQ against its defining properties: a float64 implementation of the paper's algorithm, and rounding to nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgelora_export.quantize.gptq import DAMPING, output_error, quantize_gptq, shorten_inputs
from edgelora_export.quantize.int4 import quantize_rtn, unpack_codes
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

GRIDS = [
    (4, True, 32),
    (4, False, 32),
    (4, True, 16),
    (4, True, 64),
    (4, True, 128),
    (4, False, 128),
    (8, True, 32),
    (8, False, 32),
]


def correlated_inputs(count: int, columns: int, seed: int) -> Floats:
    """Inputs (T, K) whose columns are correlated and differ in size, like a model's."""
    mixing = np.random.default_rng(7).normal(size=(columns, columns))
    mixing *= np.exp(np.random.default_rng(8).normal(size=columns))[:, None] / np.sqrt(columns)
    return (np.random.default_rng(seed).normal(size=(count, columns)) @ mixing).astype(np.float32)


def make_case(rows: int, columns: int) -> tuple[Floats, Floats, Floats]:
    """A weight, and the second moments of calibration and of held-out inputs."""
    weight = np.random.default_rng(1).normal(size=(rows, columns)).astype(np.float32)
    seen, unseen = (correlated_inputs(count * columns, columns, seed) for count, seed in ((8, 2), (2, 3)))
    return weight, seen.T @ seen, unseen


@pytest.mark.parametrize(("bits", "symmetric", "block_size"), GRIDS)
@pytest.mark.parametrize("columns", [256, 100])
def test_loses_less_than_rounding_on_unseen_inputs(bits: int, symmetric: bool, block_size: int, columns: int) -> None:
    weight, seen, unseen = make_case(48, columns)
    ours = quantize_gptq(weight, seen, bits=bits, block_size=block_size, symmetric=symmetric)
    rounded = quantize_rtn(weight, bits=bits, block_size=block_size, symmetric=symmetric)
    assert ours.codes.shape == rounded.codes.shape and ours.scales.shape == rounded.scales.shape
    assert (ours.zero_points is None) == symmetric
    errors = [output_error(matrix.dequantize() - weight, unseen) for matrix in (ours, rounded)]
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("rank", [48, 5])
def test_fewer_inputs_give_the_output_error_of_all(rank: int) -> None:
    """Also of errors that nearly cancel, as GPTQ's do where an input is loud, and of inputs of less than full rank."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(400, rank)) @ generator.normal(size=(rank, 48))
    loud = generator.normal(size=48)
    inputs += 1e3 * generator.normal(size=(400, 1)) * loud
    difference = generator.normal(size=(64, 48))
    difference -= np.outer(difference @ loud, loud) * (1 - 1e-5) / (loud @ loud)
    narrow, error = inputs.astype(np.float32), difference.astype(np.float32)
    short = shorten_inputs(narrow, len(error))
    assert short.shape == (48, 48)
    exact = np.square(narrow.astype(np.float64) @ error.T.astype(np.float64)).sum()
    assert output_error(error, short) == pytest.approx(exact, rel=1e-4)


def test_inputs_stay_where_fewer_save_nothing() -> None:
    inputs = np.ones((40, 48), np.float32)
    assert shorten_inputs(inputs, 64) is inputs
    assert shorten_inputs(np.ones((400, 48), np.float32), 40).shape == (400, 48)


def test_inputs_that_are_always_0_give_no_error() -> None:
    short = shorten_inputs(np.zeros((400, 48), np.float32), 64)
    assert output_error(np.ones((64, 48), np.float32), short) < 1e-30


def test_inputs_that_are_not_finite_are_refused() -> None:
    inputs = np.ones((400, 48), np.float32)
    inputs[3, 3] = np.nan
    with pytest.raises(InputError, match="calibration inputs hold NaN or infinity"):
        shorten_inputs(inputs, 64)


def test_equals_the_algorithm_of_the_paper() -> None:
    """The reference is the paper's algorithm in float64, column by column, with an explicit inverse and our scales."""
    weight, moments, _ = make_case(24, 96)
    ours = quantize_gptq(weight, moments, block_size=32, sweeps=0)
    damped = moments.astype(np.float64)
    damped[np.diag_indices(96)] += DAMPING * np.diag(damped).mean()
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = weight.astype(np.float64)
    expected = np.zeros((24, 96))
    for column in range(96):
        scale = ours.scales[:, column // 32].astype(np.float64)
        code = np.clip(np.rint(left[:, column] / scale) + 8, 0, 15)
        expected[:, column] = code
        error = (left[:, column] - (code - 8) * scale) / factor[column, column]
        left[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    codes = unpack_codes(ours.codes, 4).reshape(24, -1)
    assert (codes != expected).mean() < 0.005  # float32 may round a tie the other way, which changes later columns


def test_uncorrelated_inputs_give_the_nearest_codes() -> None:
    """With moments that are a multiple of the identity, no column can make up for another."""
    weight = np.random.default_rng(4).normal(size=(16, 64)).astype(np.float32)
    ours = quantize_gptq(weight, np.eye(64, dtype=np.float32) * 5)
    scales = np.repeat(ours.scales, 32, axis=1)
    nearest = np.clip(np.rint(weight / scales) + 8, 0, 15)
    assert np.array_equal(unpack_codes(ours.codes, 4).reshape(16, -1), nearest)


def test_inputs_that_are_always_zero() -> None:
    weight, seen, _ = make_case(16, 64)
    seen[:, 10:20] = seen[10:20] = 0
    dequantized = quantize_gptq(weight, seen).dequantize()
    assert np.isfinite(dequantized).all()
    assert np.abs(dequantized - weight)[:, 10:20].max() < 1


def test_all_zero_moments_and_weights() -> None:
    zeros = np.zeros((8, 64), np.float32)
    assert not quantize_gptq(zeros, np.zeros((64, 64), np.float32)).dequantize().any()


def test_refuses_what_does_not_fit() -> None:
    weight = np.ones((4, 32), np.float32)
    with pytest.raises(InputError, match="32 columns"):
        quantize_gptq(weight, np.eye(16, dtype=np.float32))
    with pytest.raises(InputError, match="NaN"):
        quantize_gptq(weight * np.float32(np.nan), np.eye(32, dtype=np.float32))
    with pytest.raises(InputError, match="bits = 3"):
        quantize_gptq(weight, np.eye(32, dtype=np.float32), bits=3)
