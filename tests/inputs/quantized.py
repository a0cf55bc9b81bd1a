"""Bases that are stored quantized: what they stand for, to transformers or by the format's formula, and what is read."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, MetalConfig

from edgelora_export.base.base import Base
from edgelora_runtime.errors import InputError
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
    write_base,
)
from tests.inputs.cases import Case
from tests.tiny import make_base, random_tokens, torch_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

auto: Any = AutoModelForCausalLM
TOLERANCE = 1e-5


def make_plain(folder: Path) -> Path:
    make_base(folder / "plain", intermediate_size=128)  # bitsandbytes' CPU kernel needs whole blocks of 64 in a row
    return folder / "plain"


def compare(folder: Path, values: Mapping[str, NDArray[Any]]) -> str:
    """Asserts that a base stands for these values, under these names and no others."""
    base = Base.open(folder)
    assert set(base.tensors.files) == set(values)
    worst = max(float(np.abs(base.tensor(name) - expected).max()) for name, expected in values.items())
    assert worst <= TOLERANCE
    return f"equal to {worst:.0e}"


def read_model(model: Any) -> dict[str, NDArray[Any]]:
    assert torch_logits(model.float().eval(), random_tokens(20)).std() > 0.1
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


def check_bitsandbytes(folder: Path, *, dtype: torch.dtype, **settings: Any) -> str:
    """Transformers quantizes a base, saves it, loads it again and dequantizes it."""
    config: Any = BitsAndBytesConfig(**settings)  # type: ignore[no-untyped-call]
    model = auto.from_pretrained(make_plain(folder), dtype=dtype, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder / "base")
    return compare(folder / "base", read_model(auto.from_pretrained(folder / "base").dequantize()))


def encode(folder: Path, make: Callable[..., Encoded], settings: Mapping[str, Any], **options: Any) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    return write_base(make_plain(folder), folder / "base", lambda rows, columns: make(rng, rows, columns, **options), settings)


def check_formula(folder: Path, make: Callable[..., Encoded], settings: Mapping[str, Any], **options: Any) -> str:
    """transformers needs a GPU or another package for these: the reference is a plain copy of the formula's values in float64."""
    return compare(folder / "base", encode(folder, make, settings, **options))


def check_dequantized(
    folder: Path, make: Callable[..., Encoded], settings: Mapping[str, Any], config: Any, **options: Any
) -> str:
    """Transformers dequantizes the base while it loads it."""
    encode(folder, make, settings, **options)
    loaded = auto.from_pretrained(folder / "base", dtype=torch.float32, quantization_config=config, device_map={"": "cpu"})
    return compare(folder / "base", read_model(loaded))


def check_refusal(folder: Path, settings: Mapping[str, Any], line: str, make: Callable[..., Encoded] = make_gptq) -> str:
    encode(folder, make, settings)
    try:
        Base.open(folder / "base")
    except InputError as error:
        assert str(error) == f"base {folder / 'base'}: {line}"
        return line
    raise AssertionError("it was read")


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
INT4 = describe_groups(num_bits=4, type="int", strategy="group", group_size=32, symmetric=False)
FLOAT8 = describe_groups(num_bits=8, type="float", strategy="channel", symmetric=True)


def metal() -> Any:
    return MetalConfig(bits=4, group_size=32, dequantize=True)


def fp8(block: tuple[int, int] | None) -> Any:
    return FineGrainedFP8Config(weight_block_size=cast("tuple[int, int]", block), dequantize=True)


def make_fp8_rows(rng: np.random.Generator, rows: int, columns: int) -> Encoded:
    return make_scaled(rng, rows, columns, block=(1, columns), scale="weight_scale")


def make_fp8_tensor(rng: np.random.Generator, rows: int, columns: int) -> Encoded:
    return make_scaled(rng, rows, columns, block=(rows, columns), shape=())


def make_plain_weight(rng: np.random.Generator, rows: int, columns: int) -> Encoded:
    encoded = make_scaled(rng, rows, columns, block=(rows, columns))
    return Encoded({"weight": encoded.value.astype(np.float32)}, encoded.value)


_NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_FORMULA = "the values by its formula in float64"
_DEQUANTIZED = "dequantizes it while loading"
CASES = [
    Case(
        "bitsandbytes NF4 with double quantization, bfloat16",
        "base",
        "model.dequantize()",
        "equal",
        partial(check_bitsandbytes, dtype=torch.bfloat16, bnb_4bit_use_double_quant=True, **_NF4),
    ),
    Case(
        "bitsandbytes NF4 in bfloat16 storage, float16",
        "base",
        "model.dequantize()",
        "equal",
        partial(check_bitsandbytes, dtype=torch.float16, bnb_4bit_quant_storage="bfloat16", **_NF4),
    ),
    Case(
        "bitsandbytes FP4, float32",
        "base",
        "model.dequantize()",
        "equal",
        partial(check_bitsandbytes, dtype=torch.float32, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    ),
    Case(
        "bitsandbytes 8-bit",
        "base",
        "model.dequantize()",
        "equal",
        partial(check_bitsandbytes, dtype=torch.float32, load_in_8bit=True),
    ),
    Case(
        "FP8 in blocks",
        "base",
        _DEQUANTIZED,
        "equal",
        lambda folder: check_dequantized(
            folder, make_scaled, {**FP8, "weight_block_size": [32, 32]}, fp8((32, 32)), block=(32, 32)
        ),
    ),
    Case(
        "FP8 with a scale for each tensor",
        "base",
        _DEQUANTIZED,
        "equal",
        lambda folder: check_dequantized(folder, make_fp8_tensor, {**FP8, "weight_block_size": None}, fp8(None)),
    ),
    Case(
        "Metal's affine 4-bit codes",
        "base",
        _DEQUANTIZED,
        "equal",
        lambda folder: check_dequantized(
            folder, make_mlx, {"quant_method": "metal", "bits": 4, "group_size": 32}, metal(), bias="qbiases", dtype=np.float32
        ),
    ),
    Case(
        "GPTQ with act order",
        "base",
        _FORMULA,
        "equal",
        partial(check_formula, make=make_gptq, settings={**GPTQ, "desc_act": True}, shuffled=True),
    ),
    Case(
        "GPTQ v2 in 3 bits",
        "base",
        _FORMULA,
        "equal",
        partial(check_formula, make=make_gptq, settings={**GPTQ, "bits": 3, "checkpoint_format": "gptq_v2"}, bits=3, first=False),
    ),
    Case("AWQ gemm", "base", _FORMULA, "equal", partial(check_formula, make=make_awq, settings={**AWQ, "version": "gemm"})),
    Case(
        "AWQ gemv",
        "base",
        _FORMULA,
        "equal",
        partial(check_formula, make=make_awq, settings={**AWQ, "version": "gemv"}, gemv=True),
    ),
    Case(
        "AutoRound",
        "base",
        _FORMULA,
        "equal",
        partial(
            check_formula,
            make=make_gptq,
            settings={**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        ),
    ),
    Case(
        "compressed-tensors int4 with zero points",
        "base",
        _FORMULA,
        "equal",
        partial(check_formula, make=make_packed, settings=INT4, symmetric=False),
    ),
    Case("compressed-tensors FP8", "base", _FORMULA, "equal", partial(check_formula, make=make_fp8_rows, settings=FLOAT8)),
    Case(
        "compressed-tensors MXFP4",
        "base",
        _FORMULA,
        "equal",
        partial(check_formula, make=make_mxfp4, settings=describe_groups(num_bits=4, type="float", group_size=32)),
    ),
    Case(
        "ModelOpt NVFP4",
        "base",
        _FORMULA,
        "equal",
        partial(check_formula, make=make_nvfp4, settings={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    ),
    Case(
        "mlx-lm's 4-bit codes",
        "base",
        _FORMULA,
        "equal",
        partial(check_formula, make=make_mlx, settings={"bits": 4, "group_size": 32}),
    ),
    Case(
        "MXFP4 of gpt-oss",
        "base",
        "dequantizes its experts",
        "refused",
        partial(
            check_refusal,
            settings={"quant_method": "mxfp4"},
            line="it is quantized as MXFP4 of fused experts, as gpt-oss has them, which is not read; "
            "take a dense model, as edgelora has no graph for such experts",
        ),
    ),
    Case(
        "HQQ",
        "base",
        "needs the package hqq",
        "refused",
        partial(
            check_refusal,
            settings={"quant_method": "hqq"},
            line="it is quantized as HQQ, which is not read; take the unquantized checkpoint",
        ),
    ),
    Case(
        "GPTQ whose tensors have other bits than its config",
        "base",
        "needs the package gptqmodel",
        "refused",
        partial(
            check_refusal,
            settings={**GPTQ, "bits": 8},
            line="tensor model.layers.0.mlp.down_proj.qzeros has 4 bits, where config.json says 8; download the base again",
        ),
    ),
    Case(
        "a quantization_config beside plain weights",
        "base",
        "needs the package gptqmodel",
        "refused",
        partial(
            check_refusal,
            settings=AWQ,
            make=make_plain_weight,
            line="config.json says that it is quantized by awq, and no tensor is; download it again, or, if its weights are "
            "plain, take quantization_config out of config.json",
        ),
    ),
]
