"""Every format that is read gives what its formula in float64 gives, whole and by rows."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgelora_export.base.quantized.dequantize import dequantize
from edgelora_export.base.safetensors_folder import SafetensorsFolder
from tests.export.base.quantized.checkpoints import (
    Encoded,
    describe_groups,
    make_awq,
    make_gptq,
    make_mlx,
    make_mxfp4,
    make_nvfp4,
    make_packed,
    make_scaled,
    save,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora_export.base.tensors import Tensors

seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
sizes = st.sampled_from([16, 32, 64])
blocks_of_32 = st.integers(1, 4).map(lambda count: count * 32)


def read(folder: Path, encoded: Encoded, settings: Mapping[str, Any]) -> Tensors:
    save(folder, {f"m.{part}": values for part, values in encoded.parts.items()}, {})
    tensors, config = dequantize(SafetensorsFolder.open(folder), {"quantization_config": settings}, folder)
    assert config == {}
    assert list(tensors.files.items()) == [("m.weight", "model.safetensors")]
    return tensors


def check(encoded: Encoded, settings: Mapping[str, Any], *, part: tuple[int, int] = (3, 21)) -> None:
    """The weight equals the formula's value to float32's rounding, whole and by rows."""
    with TemporaryDirectory() as folder:
        tensors = read(Path(folder), encoded, settings)
        whole = tensors.read("m.weight")
        assert whole.dtype == tensors.dtype("m.weight") == np.float32
        assert whole.shape == tensors.shape("m.weight") == encoded.value.shape
        np.testing.assert_allclose(whole, encoded.value, rtol=3e-7, atol=1e-7)
        np.testing.assert_array_equal(tensors.read_rows("m.weight", *part), whole[slice(*part)])


@given(seeds, blocks_of_32, blocks_of_32, st.sampled_from([2, 3, 4, 5, 8]), sizes, st.booleans(), st.booleans())
def test_gptq(rng: Any, rows: int, columns: int, bits: int, size: int, first: bool, shuffled: bool) -> None:
    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "desc_act": shuffled,
        "checkpoint_format": "gptq" if first else "gptq_v2",
    }
    check(make_gptq(rng, rows, columns, bits=bits, size=size, first=first, shuffled=shuffled), settings)


@given(seeds, sizes)
def test_gptq_without_an_order_of_columns(rng: Any, size: int) -> None:
    encoded = make_gptq(rng, 32, 128, size=size)
    del encoded.parts["g_idx"]
    check(encoded, {"quant_method": "gptq", "bits": 4, "group_size": size})


def test_gptq_with_one_group() -> None:
    encoded = make_gptq(np.random.default_rng(0), 32, 96, size=96)
    check(encoded, {"quant_method": "gptq", "bits": 4, "group_size": -1})


@given(seeds, st.sampled_from([3, 4]), st.booleans())
def test_auto_round_as_gptq(rng: Any, bits: int, first: bool) -> None:
    form = "auto_round:auto_gptq" if first else "auto_round"
    settings = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 32,
        "packing_format": form,
        "extra_config": {"m": {"bits": 3}},
    }
    check(make_gptq(rng, 64, 64, bits=bits, first=first), settings)


@given(seeds, blocks_of_32, blocks_of_32, sizes, st.booleans())
def test_awq(rng: Any, rows: int, columns: int, size: int, gemv: bool) -> None:
    columns = max(columns, size)
    columns -= columns % size
    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemv" if gemv else "gemm"}
    check(make_awq(rng, rows, columns, size=size, gemv=gemv), settings)


@given(seeds, st.integers(22, 90), st.integers(1, 90), st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_fp8_in_blocks_that_need_not_fit(rng: Any, rows: int, columns: int, block: tuple[int, int]) -> None:
    check(make_scaled(rng, rows, columns, block=block), {"quant_method": "fp8", "weight_block_size": list(block)})


@given(seeds, st.sampled_from([(), (1,), (1, 1), (48,), (48, 1)]), st.sampled_from(["fp8", "fbgemm_fp8"]))
def test_fp8_by_tensor_and_by_row(rng: Any, shape: tuple[int, ...], method: str) -> None:
    block = (1, 40) if 48 in shape else (48, 40)
    encoded = make_scaled(rng, 48, 40, block=block, shape=shape, scale="weight_scale_inv" if method == "fp8" else "weight_scale")
    encoded.parts["activation_scale"] = np.array(0.5, np.float32)
    check(encoded, {"quant_method": method, "weight_block_size": None, "activation_scheme": "static"})


@given(seeds)
def test_mxfp8_scales_are_exponents(rng: Any) -> None:
    encoded = make_scaled(rng, 48, 64, block=(1, 32))
    exponents = rng.integers(100, 150, (48, 2)).astype(np.uint8)
    value = encoded.parts["weight"].astype(np.float64) * np.repeat(2.0 ** (exponents.astype(np.float64) - 127), 32, 1)
    check(
        Encoded({**encoded.parts, "weight_scale_inv": exponents}, value), {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
    )


@given(seeds, st.integers(22, 70), blocks_of_32, st.integers(2, 8), st.booleans(), st.booleans())
def test_compressed_integers(rng: Any, rows: int, columns: int, bits: int, symmetric: bool, shuffled: bool) -> None:
    settings = describe_groups(num_bits=bits, type="int", strategy="group", group_size=32, symmetric=symmetric)
    check(make_packed(rng, rows, columns, bits=bits, symmetric=symmetric, shuffled=shuffled), settings)


def test_an_order_of_columns_that_is_marked_as_natural() -> None:
    encoded = make_packed(np.random.default_rng(0), 32, 64)
    encoded.parts["weight_g_idx"] = np.full(64, -1, np.int32)
    check(encoded, describe_groups(num_bits=4, symmetric=True))


@given(seeds, st.sampled_from([(1, 64), (48, 64), (1, 16)]))
def test_compressed_int8(rng: Any, block: tuple[int, int]) -> None:
    shape = (1,) if block == (48, 64) else None
    encoded = make_scaled(rng, 48, 64, block=block, kind=np.int8, scale="weight_scale", shape=shape)
    check(encoded, describe_groups(num_bits=8, type="int", symmetric=True))


def test_compressed_int8_with_zero_points() -> None:
    rng = np.random.default_rng(0)
    encoded = make_scaled(rng, 48, 64, block=(1, 64), kind=np.int8, scale="weight_scale")
    zeros = rng.integers(-100, 100, (48, 1)).astype(np.int8)
    value = (encoded.parts["weight"].astype(np.float64) - zeros) * encoded.parts["weight_scale"].astype(np.float64)
    check(Encoded({**encoded.parts, "weight_zero_point": zeros}, value), describe_groups(num_bits=8, symmetric=False))


@given(seeds, st.sampled_from([(1, 50), (32, 16)]))
def test_compressed_float8(rng: Any, block: tuple[int, int]) -> None:
    encoded = make_scaled(rng, 48, 50, block=block, scale="weight_scale")
    structure = {} if block[0] == 1 else {"block_structure": list(block)}
    check(encoded, describe_groups(num_bits=8, type="float", symmetric=True, **structure))


@given(seeds, blocks_of_32)
def test_small_floats(rng: Any, columns: int) -> None:
    check(make_nvfp4(rng, 40, columns), {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    check(make_nvfp4(rng, 40, columns, divided=True), describe_groups(num_bits=4, type="float", group_size=16))
    check(make_mxfp4(rng, 40, columns), describe_groups(num_bits=4, type="float", group_size=32))


@given(seeds, st.integers(22, 60), blocks_of_32, st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from(["biases", "qbiases"]))
def test_mlx(rng: Any, rows: int, columns: int, bits: int, bias: str) -> None:
    settings: dict[str, Any] = {"bits": bits, "group_size": 32}
    check(make_mlx(rng, rows, columns, bits=bits, bias=bias), settings)
    check(make_mlx(rng, rows, columns, bits=bits, bias=bias), {"bits": 1, "group_size": 7, "m": settings})


def test_several_files_keep_their_names(tmp_path: Path) -> None:
    """A tensor lies in the file of its codes, where a checkpoint made of this base puts it again."""
    encoded = make_scaled(np.random.default_rng(0), 8, 8, block=(8, 8))
    save(tmp_path, {f"m.{part}": values for part, values in encoded.parts.items()}, {})
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00002-of-00002.safetensors")
    norm = np.ones(4, ml_dtypes.bfloat16)
    save(tmp_path, {"norm.weight": norm}, {})
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    places = {"m.weight": 2, "m.weight_scale_inv": 2, "norm.weight": 1}
    names = {name: f"model-0000{place}-of-00002.safetensors" for name, place in places.items()}
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {names}}}'.replace("'", '"'), encoding="utf-8")
    tensors, _ = dequantize(SafetensorsFolder.open(tmp_path), {"quantization_config": {"quant_method": "fp8"}}, tmp_path)
    assert tensors.files == {name: file for name, file in names.items() if name.endswith(".weight")}
    assert tensors.dtype("norm.weight") == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensors.read("norm.weight"), norm)
    np.testing.assert_array_equal(tensors.read_rows("norm.weight", 1, 3), norm[1:3])
