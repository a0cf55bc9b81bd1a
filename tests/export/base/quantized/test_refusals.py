"""A quantized base that cannot be read is refused in one line: which tensor or setting, and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.quantization_config import QuantizationMethod

from edgelora_export.base.base import Base
from edgelora_export.base.quantized.dequantize import _READERS, dequantize, name_method
from edgelora_export.base.quantized.unread import INSTEAD, UNREAD
from edgelora_export.base.safetensors_folder import SafetensorsFolder
from edgelora_runtime.errors import InputError
from tests.export.base.quantized.checkpoints import (
    Memory,
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
    from collections.abc import Callable

RNG = np.random.default_rng(0)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
INT4 = describe_groups(num_bits=4, symmetric=True)
MLX = {"bits": 4, "group_size": 32}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
STATE = "weight.quant_state.bitsandbytes__nf4"
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def make_nf4(**state: Any) -> dict[str, Any]:
    """Parts of an NF4 weight with the state of the writer, some of it changed."""
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 8], **state}
    return {
        "weight": np.full((32, 1), 0x77, np.uint8),
        "weight.absmax": np.ones(1, np.float32),
        "weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        STATE: np.frombuffer(json.dumps(said).encode(), np.uint8),
    }


def make_int8(**parts: Any) -> dict[str, Any]:
    return {"weight": np.zeros((8, 8), np.int8), "SCB": np.ones(8, np.float32), **parts}


def open_error(folder: Path, parts: dict[str, Any], config: dict[str, Any]) -> str:
    save(folder, {f"m.{part}": values for part, values in parts.items()}, config)
    with pytest.raises(InputError) as caught:
        tensors, plain = dequantize(SafetensorsFolder.open(folder), config, folder)
        Base(folder, plain, tensors, {}).tensor("m.weight")
    line = str(caught.value)
    assert line.isprintable()
    assert str(folder) in line
    return line.replace(f"base {folder}: ", "")


def gptq(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: make_gptq(RNG, 32, 64).parts | changes


def without(parts: dict[str, Any], name: str) -> dict[str, Any]:
    return {part: values for part, values in parts.items() if part != name}


CONTRADICTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "gptq: other bits": (make_gptq(RNG, 32, 64).parts, {**GPTQ, "bits": 8}, "m.qzeros has 4 bits, where config.json says 8"),
    "gptq: other groups": (make_gptq(RNG, 32, 64).parts, {**GPTQ, "group_size": 16}, "m.scales has 2 groups of 64 inputs"),
    "gptq: group 0": (make_gptq(RNG, 32, 64).parts, {**GPTQ, "group_size": 0}, "config.json says 0 in each"),
    "gptq: bits that are words": (make_gptq(RNG, 32, 64).parts, {**GPTQ, "bits": "four"}, "bits = 'four' in config.json"),
    "gptq: no zero points": (without(make_gptq(RNG, 32, 64).parts, "qzeros"), GPTQ, "m.qzeros is missing"),
    "gptq: no scales": (without(make_gptq(RNG, 32, 64).parts, "scales"), GPTQ, "m.scales is missing"),
    "gptq: no order": (without(make_gptq(RNG, 32, 64).parts, "g_idx"), {**GPTQ, "desc_act": True}, "m.g_idx is missing"),
    "gptq: short order": (
        gptq(g_idx=np.zeros(7, np.int32))(),
        GPTQ,
        "m.g_idx has the shape [7], where 64 columns in 2 groups needs [64]",
    ),
    "gptq: group that is not there": (gptq(g_idx=np.full(64, 2, np.int32))(), GPTQ, "m.g_idx names groups other than 0 to 1"),
    "gptq: scales of fewer rows": (gptq(scales=np.ones((2, 16), np.float16))(), GPTQ, "m.qweight has the shape [8, 32]"),
    "gptq: codes in int64": (gptq(qweight=np.zeros((8, 32), np.int64))(), GPTQ, "m.qweight is int64"),
    "gptq: marlin": (make_gptq(RNG, 32, 64).parts, {**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
    "gptq: a scale that is not finite": (gptq(scales=np.full((2, 32), np.inf, np.float16))(), GPTQ, "m.weight of base"),
    "awq: other groups": (make_awq(RNG, 32, 64).parts, {**AWQ, "group_size": 64}, "m.scales has the shape [2, 32]"),
    "awq: bits": (make_awq(RNG, 32, 64).parts, {**AWQ, "bits": 3}, "AWQ of 3 bits"),
    "awq: version": (make_awq(RNG, 32, 64).parts, {**AWQ, "version": "gemv_fast"}, "'gemv_fast' is not read, only gemm and gemv"),
    "awq: layout": (make_awq(RNG, 32, 64).parts, {**AWQ, "version": "gemv"}, "m.qzeros"),
    "fp8: no scales": (
        without(make_scaled(RNG, 32, 64, block=(32, 32)).parts, "weight_scale_inv"),
        FP8,
        "m.weight is float8_e4m3fn",
    ),
    "fp8: other blocks": (make_scaled(RNG, 32, 64, block=(8, 8)).parts, FP8, "m.weight_scale_inv has the shape [4, 8]"),
    "fp8: block": (
        make_scaled(RNG, 32, 64, block=(8, 8)).parts,
        {**FP8, "weight_block_size": [0, 8]},
        "weight_block_size = [0, 8]",
    ),
    "fp8: scales that do not divide": (
        make_scaled(RNG, 30, 64, block=(8, 8)).parts,
        {"quant_method": "fp8"},
        "m.weight_scale_inv has the shape [4, 8], which does not divide",
    ),
    "fp8: smoothed inputs": (
        make_scaled(RNG, 32, 64, block=(32, 32)).parts | {"pre_quant_scale": np.ones(64, np.float16)},
        FP8,
        "m.pre_quant_scale belongs to no weight",
    ),
    "packed: other bits": (
        make_packed(RNG, 32, 64).parts,
        describe_groups(num_bits=8),
        "fits in none of the numbers of bits in config.json (8)",
    ),
    "packed: no zero points": (
        make_packed(RNG, 32, 64).parts,
        describe_groups(num_bits=4, symmetric=False),
        "m.weight_zero_point",
    ),
    "packed: no shape": (without(make_packed(RNG, 32, 64).parts, "weight_shape"), INT4, "m.weight_shape is missing"),
    "packed: no scales": (without(make_packed(RNG, 32, 64).parts, "weight_scale"), INT4, "m.weight_scale is missing"),
    "packed: group that is not there": (
        make_packed(RNG, 32, 64).parts | {"weight_g_idx": np.full(64, 5, np.int32)},
        INT4,
        "m.weight_g_idx names groups",
    ),
    "packed: 16 bits": (
        make_packed(RNG, 32, 64).parts | {"weight_packed": np.zeros((32, 32), np.int32)},
        describe_groups(num_bits=16),
        "fits in none of the numbers of bits",
    ),
    "packed: zero points in bytes": (
        make_packed(RNG, 32, 64, symmetric=False).parts | {"weight_zero_point": np.zeros((32, 2), np.int8)},
        INT4,
        "m.weight_zero_point is int8",
    ),
    "packed: no groups": (make_packed(RNG, 32, 64).parts, {"quant_method": "compressed-tensors"}, "no config_groups"),
    "packed: bits": (make_packed(RNG, 32, 64).parts, describe_groups(num_bits=None), "num_bits = None"),
    "packed: sparse": (
        make_packed(RNG, 32, 64).parts,
        {**INT4, "sparsity_config": {"format": "sparse-24-bitmask"}},
        "'sparse-24",
    ),
    "packed: rotated": (
        make_packed(RNG, 32, 64).parts,
        {**INT4, "transform_config": {"config_groups": {"a": 1}}},
        "transform_config",
    ),
    "float weights with scales": (
        {"weight": np.ones((8, 8), np.float32), "weight_scale": np.ones(8, np.float32)},
        INT4,
        "says that it is quantized by compressed-tensors, and no tensor is",
    ),
    "mxfp4: scales in floats": (
        make_mxfp4(RNG, 8, 64).parts | {"weight_scale": np.ones((8, 2), np.float32)},
        describe_groups(num_bits=4, type="float"),
        "m.weight_scale is float32",
    ),
    "nvfp4: other groups": (
        make_nvfp4(RNG, 8, 64).parts | {"weight_scale": make_nvfp4(RNG, 8, 32).parts["weight_scale"]},
        NVFP4,
        "m.weight has 32 bytes in a row",
    ),
    "modelopt: algorithm": (make_nvfp4(RNG, 8, 64).parts, {**NVFP4, "quant_algo": "W4A8_AWQ"}, "'W4A8_AWQ' is not read"),
    "mlx: mode": (make_mlx(RNG, 8, 64).parts, {**MLX, "mode": "mxfp4"}, "mode 'mxfp4' is not read, only affine"),
    "mlx: other bits": (make_mlx(RNG, 8, 64).parts, {**MLX, "bits": 8}, "m.weight has the shape [8, 8]"),
    "mlx: no biases": (without(make_mlx(RNG, 8, 64).parts, "biases"), MLX, "m.biases is missing"),
    "auto-round: packing": (
        make_gptq(RNG, 32, 64).parts,
        {"quant_method": "auto-round", "packing_format": "auto_round:fp8"},
        "packing_format = 'auto_round:fp8'",
    ),
    "nf4: broken state": (
        make_nf4() | {STATE: np.frombuffer(b"{", np.uint8)},
        BNB,
        f"m.{STATE} is not a quantization state",
    ),
    "nf4: shape that is no list": (make_nf4(shape=7), BNB, f"m.{STATE} is not"),
    "nf4: other shape": (make_nf4(shape=[8, 10]), BNB, "m.weight has the shape [32, 1], where its state"),
    "nf4: other block": (make_nf4(blocksize=32), BNB, "m.weight.absmax has the shape [1]"),
    "nf4: no block": (make_nf4(blocksize=0), BNB, "state that bitsandbytes does not write"),
    "nf4: infinite offset": (
        make_nf4(nested_blocksize=256, nested_offset=float("inf"), nested_dtype="float32"),
        BNB,
        "state that bitsandbytes does not write",
    ),
    "nf4: other name": (make_nf4(quant_type="fp4"), BNB, "state that bitsandbytes does not write"),
    "nf4: scales in bytes": (make_nf4() | {"weight.absmax": np.ones(1, np.uint8)}, BNB, "m.weight.absmax is uint8"),
    "nf4: no state": (without(make_nf4(), STATE), BNB, "no tensor is"),
    "nf4: a part too many": (
        make_nf4() | {"weight.nested_absmax": np.ones(1, np.float32)},
        BNB,
        "m.weight.nested_absmax belongs to no weight",
    ),
    "int8: said to be 4 bits": (make_int8(), BNB, "no tensor is"),
    "int8: tiles": (make_int8(weight_format=np.array(2, np.uint8)), {"load_in_8bit": True}, "m.weight_format says"),
    "int8: fewer scales": (make_int8(SCB=np.ones(7, np.float32)), {"load_in_8bit": True}, "m.SCB has the shape [7]"),
    "int8: float weight": (make_int8(weight=np.ones((8, 8), np.float16)), {"load_in_8bit": True}, "m.weight is float16"),
    "no quant_method": (
        {"weight": np.ones((8, 8), np.float32)},
        {"bits": 4},
        "quantized as an unnamed format, which is not read",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_tensors_that_contradict_the_config(name: str, tmp_path: Path) -> None:
    parts, settings, expected = CONTRADICTIONS[name]
    assert expected in open_error(tmp_path, parts, {"quantization_config": settings})


@pytest.mark.parametrize("method", [method.value for method in QuantizationMethod])
def test_every_method_of_transformers_is_read_or_named(method: str) -> None:
    assert (name_method({"quant_method": method}) in _READERS) != (method in UNREAD)


@pytest.mark.parametrize("method", [*UNREAD, "brand-new"])
def test_a_format_that_is_not_read_is_named_with_its_origin(method: str, tmp_path: Path) -> None:
    settings = {"quantization_config": {"quant_method": method}, "_name_or_path": "someone/Model-7B"}
    line = open_error(tmp_path / "Model-7B-quantized", {"weight": np.ones((8, 8), np.float32)}, settings)
    named = UNREAD.get(method, method)
    expected = f"it is quantized as {named}, which is not read; {INSTEAD.get(method, 'take the unquantized checkpoint')}"
    assert line == f"{expected} (its config.json names someone/Model-7B)"
    own = open_error(tmp_path / "Model-7B", {"weight": np.ones((8, 8), np.float32)}, settings)
    assert own == expected, "a config that names its own folder says nothing new"


def test_codes_without_a_quantization_config(tmp_path: Path) -> None:
    """ModelOpt writes hf_quant_config.json beside, and some tools drop the settings: never read codes as if they were weights."""
    line = open_error(tmp_path, make_scaled(RNG, 8, 8, block=(8, 8)).parts, {})
    assert line.startswith(
        "tensor m.weight_scale_inv is a part of a quantized weight, and config.json has no quantization_config"
    )


def test_codes_without_scales(tmp_path: Path) -> None:
    encoded = make_int8() | {"m2.weight": np.zeros((4, 4), np.int8)}
    line = open_error(tmp_path, encoded, {"quantization_config": {"load_in_8bit": True}})
    assert line.startswith("tensor m.m2.weight is int8, which are codes without scales")


BASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gptq": (make_gptq(RNG, 32, 64).parts, {**GPTQ, "desc_act": True, "checkpoint_format": "gptq"}),
    "awq": (make_awq(RNG, 32, 64).parts, {**AWQ, "version": "gemm"}),
    "awq gemv": (make_awq(RNG, 32, 64, gemv=True).parts, {**AWQ, "version": "gemv"}),
    "fp8": (make_scaled(RNG, 32, 64, block=(32, 32)).parts, FP8),
    "packed": (make_packed(RNG, 32, 64, symmetric=False, shuffled=True).parts, INT4),
    "int8": (make_scaled(RNG, 32, 64, block=(1, 64), kind=np.int8, scale="weight_scale").parts, INT4),
    "nvfp4": (make_nvfp4(RNG, 32, 64).parts, NVFP4),
    "mxfp4": (make_mxfp4(RNG, 32, 64).parts, describe_groups(num_bits=4, type="float")),
    "mlx": (make_mlx(RNG, 32, 64).parts, MLX),
    "nf4": (make_nf4(), BNB),
    "llm.int8": (make_int8(), {"load_in_8bit": True}),
}
DTYPES = [np.uint8, np.int8, np.int32, np.uint32, np.int64, np.float16, np.float32, np.bool_]
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
shapes = st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 32, 64]), max_size=3).map(tuple)


@pytest.mark.parametrize("name", BASES)
@given(data=st.data())
def test_whatever_is_broken_is_one_line(name: str, data: Any) -> None:
    """A tensor of any shape and type, and a setting of any value: read, or refused as InputError, and no other error."""
    parts, settings = BASES[name]
    parts, settings = dict(parts), dict(settings)
    if data.draw(st.booleans()):
        settings[data.draw(st.sampled_from(sorted(settings)))] = data.draw(junk)
    else:
        part = data.draw(st.sampled_from(sorted(parts)))
        with np.errstate(all="ignore"):
            values = np.resize(parts[part].astype(np.float32), data.draw(shapes)).astype(data.draw(st.sampled_from(DTYPES)))
        parts[part] = values
    tensors = Memory({f"m.{part}": values for part, values in parts.items()})
    try:
        read, _ = dequantize(tensors, {"quantization_config": settings}, Path("base"))
        assert read.read("m.weight").shape == read.shape("m.weight")
    except InputError as error:
        assert str(error).isprintable()


def test_names_that_a_terminal_would_obey(tmp_path: Path) -> None:
    line = open_error(tmp_path, {"\x1b[31m.qweight": np.zeros((8, 32), np.int32)}, {"quantization_config": GPTQ})
    assert line.startswith("tensor m.\\x1b[31m.scales is missing")


def test_settings_that_are_no_object(tmp_path: Path) -> None:
    line = open_error(tmp_path, {"weight": np.ones((8, 8), np.float32)}, {"quantization_config": "gptq"})
    assert line == "quantization_config in config.json is str, not an object"


def test_settings_of_a_text_model_in_a_wrapper(tmp_path: Path) -> None:
    encoded = make_gptq(RNG, 32, 64)
    save(tmp_path, {f"m.{part}": values for part, values in encoded.parts.items()}, {})
    config = {
        "model_type": "wrapper",
        "text_config": {"model_type": "llama", "quantization_config": GPTQ},
        "quantization_config": None,
    }
    tensors, plain = dequantize(SafetensorsFolder.open(tmp_path), config, tmp_path)
    assert plain == {"model_type": "wrapper", "text_config": {"model_type": "llama"}}
    np.testing.assert_allclose(tensors.read("m.weight"), encoded.value, rtol=1e-6)
    assert "quantization_config" in config["text_config"], "the caller's config stays as it was"  # type: ignore[operator]
