"""The quantization grid: packing, error bounds, and that onnxruntime reads the codes as we mean them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from edgelora_export.quantize.int4 import BITS, BLOCK_SIZES, BlockQuantized, pack_codes, quantize_rtn, unpack_codes
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

GRIDS = [(bits, block, symmetric) for bits in BITS for block in BLOCK_SIZES for symmetric in (True, False)]

weights = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 70)),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)
grids = st.sampled_from(GRIDS)


def reference_dequantize(matrix: BlockQuantized) -> NDArray[np.float64]:
    """Reads codes, scales and zero points one by one, as the MatMulNBits documentation describes them."""
    rows, blocks = matrix.scales.shape
    per_byte = 8 // matrix.bits
    mask = (1 << matrix.bits) - 1
    out = np.zeros((rows, blocks * matrix.block_size))
    for row in range(rows):
        for block in range(blocks):
            zero = 1 << (matrix.bits - 1)
            if matrix.zero_points is not None:
                byte = int(matrix.zero_points[row, block // per_byte])
                zero = byte >> (matrix.bits * (block % per_byte)) & mask
            for index in range(matrix.block_size):
                byte = int(matrix.codes[row, block, index // per_byte])
                code = byte >> (matrix.bits * (index % per_byte)) & mask
                out[row, block * matrix.block_size + index] = (code - zero) * float(matrix.scales[row, block])
    return out[:, : matrix.columns]


def blocks_of(weight: Floats, block_size: int) -> NDArray[np.float64]:
    """float64 (N, blocks, block_size), the tail filled with zeros."""
    rows, columns = weight.shape
    padded = np.zeros((rows, -(-columns // block_size) * block_size))
    padded[:, :columns] = weight
    return padded.reshape(rows, -1, block_size)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(0, 4), st.integers(0, 33)), elements=st.integers(0, 15)))
def test_unpack_inverts_pack(codes: NDArray[np.uint8]) -> None:
    packed = pack_codes(codes, 4)
    assert packed.dtype == np.uint8
    assert packed.shape[-1] == -(-codes.shape[-1] // 2)
    unpacked = unpack_codes(packed, 4)
    np.testing.assert_array_equal(unpacked[..., : codes.shape[-1]], codes)
    assert not unpacked[..., codes.shape[-1] :].any()
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes, 8), 8), codes)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(0, 4), st.integers(0, 33))))
def test_pack_inverts_unpack(packed: NDArray[np.uint8]) -> None:
    np.testing.assert_array_equal(pack_codes(unpack_codes(packed, 4), 4), packed)


def test_the_first_code_is_the_low_nibble() -> None:
    assert pack_codes(np.array([[1, 2, 15]], np.uint8), 4).tolist() == [[0x21, 0x0F]]


@given(weights, grids)
@settings(deadline=None)
def test_dequantize_reads_the_documented_layout(weight: Floats, grid: tuple[int, int, bool]) -> None:
    bits, block, symmetric = grid
    matrix = quantize_rtn(weight, bits=bits, block_size=block, symmetric=symmetric)
    blocks = -(-weight.shape[1] // block)
    assert matrix.codes.shape == (len(weight), blocks, block * bits // 8)
    assert matrix.scales.shape == (len(weight), blocks)
    if symmetric:
        assert matrix.zero_points is None
    else:
        assert matrix.zero_points is not None
        assert matrix.zero_points.shape == (len(weight), -(-blocks * bits // 8))
    np.testing.assert_allclose(matrix.dequantize(), reference_dequantize(matrix), rtol=1e-6)


@given(weights, grids)
@settings(deadline=None)
def test_error_of_every_block_is_bounded(weight: Floats, grid: tuple[int, int, bool]) -> None:
    """Every error is at most half a step of its block's scale, or the block's squared error is below plain absmax rounding's."""
    bits, block, symmetric = grid
    matrix = quantize_rtn(weight, bits=bits, block_size=block, symmetric=symmetric)
    exact, found = blocks_of(weight, block), blocks_of(matrix.dequantize(), block)
    error = np.abs(exact - found)
    half_step = np.abs(matrix.scales.astype(np.float64))[:, :, None] / 2
    slack = 1 + 1e-4
    within = (error <= half_step * slack).all(axis=2)
    half = 1 << (bits - 1)
    plain_scale = np.abs(exact).max(axis=2, keepdims=True) / half
    safe = np.where(plain_scale == 0, 1, plain_scale)
    plain = np.clip(np.rint(exact / safe), -half, half - 1) * plain_scale
    better = np.square(error).sum(axis=2) <= np.square(exact - plain).sum(axis=2) * slack
    assert (within | better).all()


@given(weights)
@settings(deadline=None)
def test_symmetric_int4_is_never_worse_than_the_plain_grids(weight: Floats) -> None:
    """absmax/8 with either sign, absmax/7.5 and absmax/7: the searched step beats each of them in every block."""
    matrix = quantize_rtn(weight, bits=4, block_size=32)
    exact = blocks_of(weight, 32)
    error = np.square(exact - blocks_of(matrix.dequantize(), 32)).sum(axis=2)
    absmax = np.abs(exact).max(axis=2, keepdims=True)
    signed = np.take_along_axis(exact, np.abs(exact).argmax(axis=2)[:, :, None], axis=2)
    for scale in (absmax / -7, signed / -8, signed / -7.5, signed / -7):
        plain = np.clip(np.rint(exact / np.where(scale == 0, 1, scale)), -8, 7) * scale
        assert (error <= np.square(exact - plain).sum(axis=2) * (1 + 1e-4) + 1e-7 * np.square(exact).sum(axis=2)).all()


@pytest.mark.parametrize(("bits", "block", "symmetric"), GRIDS)
def test_zeros_stay_zeros(bits: int, block: int, symmetric: bool) -> None:
    weight = np.zeros((3, 50), np.float32)
    weight[1, 7] = 0.5  # a block with one value, beside blocks of none
    found = quantize_rtn(weight, bits=bits, block_size=block, symmetric=symmetric).dequantize()
    assert not found[[0, 2]].any()
    assert not found[1, np.arange(50) != 7].any()
    assert found[1, 7] == pytest.approx(0.5, rel=0.13)


@pytest.mark.parametrize(("bits", "block", "symmetric"), GRIDS)
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_a_constant_block_is_kept(bits: int, block: int, symmetric: bool, value: float) -> None:
    weight = np.full((2, block), value, np.float32)
    found = quantize_rtn(weight, bits=bits, block_size=block, symmetric=symmetric).dequantize()
    np.testing.assert_allclose(found, weight, rtol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-38, 1e-30, 1e-20, 1.0, 1e10, 1e25, 1e38, 2.5e38])
@pytest.mark.parametrize("bits", BITS)
def test_extreme_magnitudes(bits: int, size: float, symmetric: bool) -> None:
    """From numbers below the smallest normal float32 (which may round to 0) up to nearly the largest."""
    unit = np.random.default_rng(0).uniform(-1, 1, (4, 64)).astype(np.float32)
    weight = (unit * np.float64(size)).astype(np.float32)
    found = quantize_rtn(weight, bits=bits, block_size=32, symmetric=symmetric).dequantize()
    assert np.isfinite(found).all()
    step = 2.0 * size / ((1 << bits) - 1)
    assert np.abs(found.astype(np.float64) - weight).max() <= max(1.1 * step, 1e-37)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_not_finite_is_refused(value: float, symmetric: bool) -> None:
    weight = np.ones((40, 33), np.float32)
    weight[39, 32] = value
    with pytest.raises(InputError, match="NaN or infinity"):
        quantize_rtn(weight, symmetric=symmetric)


@pytest.mark.parametrize(("bits", "block"), [(3, 32), (0, 32), (16, 32), (4, 0), (4, 24), (4, 8), (8, 512)])
def test_grid_that_onnxruntime_cannot_run_is_refused(bits: int, block: int) -> None:
    with pytest.raises(InputError, match=r"use one of|4 or 8 bits"):
        quantize_rtn(np.ones((2, 64), np.float32), bits=bits, block_size=block)


def test_chunks_do_not_change_the_result() -> None:
    weight = np.random.default_rng(1).normal(size=(101, 77)).astype(np.float32)
    whole = quantize_rtn(weight, symmetric=False)
    chunked = quantize_rtn(weight, symmetric=False, chunk_elements=200)
    np.testing.assert_array_equal(whole.codes, chunked.codes)
    np.testing.assert_array_equal(whole.scales, chunked.scales)
    np.testing.assert_array_equal(np.asarray(whole.zero_points), np.asarray(chunked.zero_points))


def run_node(node: onnx.NodeProto, x: NDArray[Any], matrix: BlockQuantized, **initializers: NDArray[Any]) -> Floats:
    """What onnxruntime computes for one node with input x and the given initializers."""
    dtype = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}[x.dtype.name]
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info("x", dtype, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    return np.asarray(found)


@pytest.mark.parametrize("columns", [32, 33, 64, 100, 256])
@pytest.mark.parametrize(("bits", "block", "symmetric"), [grid for grid in GRIDS if grid[1] in (16, 32, 128)])
def test_matmulnbits_multiplies_by_what_we_dequantize(bits: int, block: int, symmetric: bool, columns: int) -> None:
    random = np.random.default_rng(columns)
    weight = random.normal(0.1, 1, (24, columns)).astype(np.float32)
    matrix = quantize_rtn(weight, bits=bits, block_size=block, symmetric=symmetric)
    constants: dict[str, NDArray[Any]] = {"codes": matrix.codes, "scales": matrix.scales}
    if matrix.zero_points is not None:
        constants["zeros"] = matrix.zero_points
    for tokens in (1, 5):
        x = random.normal(size=(1, tokens, columns)).astype(np.float32)
        expected = x.astype(np.float64) @ reference_dequantize(matrix).T
        for level, tolerance in ((1, 1e-4), (4, 0.03)):
            node = helper.make_node(
                "MatMulNBits",
                ["x", *constants],
                ["y"],
                domain="com.microsoft",
                K=columns,
                N=24,
                bits=bits,
                block_size=block,
                accuracy_level=level,
            )
            found = run_node(node, x, matrix, **constants)
            assert np.sqrt(np.square(found - expected).mean()) <= tolerance * expected.std()


@pytest.mark.parametrize("columns", [32, 48, 100])
@pytest.mark.parametrize(("bits", "block", "symmetric"), [grid for grid in GRIDS if grid[1] in (16, 32, 128)])
def test_gather_reads_the_rows_that_we_dequantize(bits: int, block: int, symmetric: bool, columns: int) -> None:
    weight = np.random.default_rng(columns).normal(size=(11, columns)).astype(np.float32)
    matrix = quantize_rtn(weight, bits=bits, block_size=block, symmetric=symmetric)
    constants: dict[str, NDArray[Any]] = {"codes": matrix.codes.reshape(11, -1)}
    inputs = ["codes", "x", "scales"]
    constants["scales"] = matrix.scales
    if matrix.zero_points is not None:
        constants["zeros"] = matrix.zero_points
        inputs.append("zeros")
    node = helper.make_node(
        "GatherBlockQuantized",
        inputs,
        ["y"],
        domain="com.microsoft",
        bits=bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    ids = np.array([[0, 10, 3, 3]], np.int64)
    found = run_node(node, ids, matrix, **constants)[:, :, :columns]
    np.testing.assert_allclose(found[0], reference_dequantize(matrix)[ids[0]], rtol=1e-5, atol=1e-6)
