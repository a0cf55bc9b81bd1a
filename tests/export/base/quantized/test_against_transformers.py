"""Bases that transformers itself quantized or dequantizes: the same weights to the last bit, and the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, MetalConfig

from edgelora_export.base.base import Base
from edgelora_export.base.quantized.dequantize import dequantize
from edgelora_export.base.safetensors_folder import SafetensorsFolder
from edgelora_runtime import Runtime
from tests.export.base.quantized.checkpoints import Memory, make_mlx, make_scaled, write_base
from tests.tiny import export_base, make_base, make_tokenizer, random_tokens, torch_logits

if TYPE_CHECKING:
    from tests.export.base.quantized.checkpoints import Encoded

auto: Any = AutoModelForCausalLM


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "base"
    make_base(folder, intermediate_size=128)  # bitsandbytes' CPU kernel errs where rows are no multiple of its blocks of 64
    return folder


def quantize(plain: Path, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Saves a base as bitsandbytes holds it, loads it as a user does, and returns it as transformers dequantizes it."""
    config: Any = BitsAndBytesConfig(**settings)  # type: ignore[no-untyped-call]
    model = auto.from_pretrained(plain, dtype=dtype, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return auto.from_pretrained(folder).dequantize().eval()


def check_weights(folder: Path, model: Any, tolerance: float = 0) -> Base:
    base = Base.open(folder)
    theirs = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    assert set(base.tensors.files) == set(theirs)
    assert "quantization_config" not in base.config
    for name, values in theirs.items():
        ours = base.tensor(name)
        assert base.tensors.shape(name) == ours.shape == values.shape
        assert np.abs(ours - values).max() <= tolerance, name
        if ours.ndim == 2:
            np.testing.assert_array_equal(base.rows(name, 5, 19), ours[5:19])
    return base


def check_logits(folder: Path, model: Any, bundle: Path) -> None:
    export_base(folder, bundle)
    tokens = random_tokens(40)
    expected = torch_logits(model.float(), tokens)
    assert expected.std() > 0.1, "logits that hardly differ would make any comparison pass"
    with Runtime(bundle, threads=1) as runtime:
        assert np.abs(runtime.logits(tokens) - expected).max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4bit(plain: Path, tmp_path: Path, kind: str, double: bool, dtype: torch.dtype) -> None:
    model = quantize(
        plain, tmp_path / "base", dtype, load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    check_weights(tmp_path / "base", model)


def test_bitsandbytes_4bit_in_wider_storage(plain: Path, tmp_path: Path) -> None:
    """Training by FSDP keeps codes in bfloat16 tensors."""
    model = quantize(
        plain, tmp_path / "base", torch.bfloat16, load_in_4bit=True, bnb_4bit_quant_storage="bfloat16", bnb_4bit_quant_type="nf4"
    )
    base = check_weights(tmp_path / "base", model)
    stored = SafetensorsFolder.open(base.path)
    assert stored.dtype("model.layers.0.mlp.down_proj.weight").name == "bfloat16"


def test_logits_of_nf4(plain: Path, tmp_path: Path) -> None:
    model = quantize(plain, tmp_path / "base", load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    check_logits(tmp_path / "base", model, tmp_path / "bundle")


def test_bitsandbytes_8bit(plain: Path, tmp_path: Path) -> None:
    model = quantize(plain, tmp_path / "base", load_in_8bit=True)
    check_weights(tmp_path / "base", model, tolerance=1e-7)
    check_logits(tmp_path / "base", model, tmp_path / "bundle")


def test_modules_that_are_skipped_stay_plain(plain: Path, tmp_path: Path) -> None:
    skipped = ["lm_head", "model.layers.1"]
    model = quantize(plain, tmp_path / "base", load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)
    base = check_weights(tmp_path / "base", model)
    original = Base.open(plain)
    for name in original.tensors.files:
        same = np.array_equal(base.tensor(name), original.tensor(name))
        assert same != ("layers.0" in name and "proj" in name), name


sizes = st.integers(1, 48)


@given(
    sizes, sizes, st.sampled_from([32, 64, 128]), st.sampled_from(["nf4", "fp4"]), st.booleans(), st.integers(0, 2**31), st.data()
)
def test_any_shape_and_block(rows: int, columns: int, block: int, kind: str, double: bool, seed: int, data: Any) -> None:
    """Blocks run over the ends of rows, and the last may be short. Rows of whole blocks are bitsandbytes' own to the last bit."""
    weight = torch.randn(rows, 2 * columns, generator=torch.Generator().manual_seed(seed))
    codes, state = quantize_4bit(weight, blocksize=block, compress_statistics=double, quant_type=kind)
    tensors = Memory(
        {"m.weight": codes.numpy(), **{f"m.weight.{part}": value.numpy() for part, value in state.as_dict(packed=True).items()}}
    )
    read, _ = dequantize(tensors, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, Path("memory"))
    whole = read.read("m.weight")
    np.testing.assert_allclose(whole, compute_4bit(codes, state), rtol=1e-6, atol=1e-7)
    if 2 * columns % block == 0:
        np.testing.assert_array_equal(whole, dequantize_4bit(codes, state).numpy())
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    np.testing.assert_array_equal(read.read_rows("m.weight", start, stop), whole[start:stop])


def compute_4bit(codes: torch.Tensor, state: Any) -> np.ndarray[Any, Any]:
    """The values by the formula in float64: code × scale of the block, blocks of the flattened weight."""
    octets = codes.numpy().reshape(-1)
    places = np.stack((octets >> 4, octets & 15), axis=1).reshape(-1)
    scales = state.absmax
    if state.nested:
        scales = state.state2.code[scales.long()] * state.state2.absmax.repeat_interleave(256)[: len(scales)] + state.offset
    flat = np.repeat(scales.double().numpy(), state.blocksize)[: places.size]
    values: np.ndarray[Any, Any] = state.code.double().numpy()[places] * flat
    return values[: np.prod(state.shape)].reshape(state.shape)


def fp8_block(rows: int, columns: int) -> Encoded:
    return make_scaled(np.random.default_rng(rows * columns), rows, columns, block=(32, 32))


def fp8_tensor(rows: int, columns: int) -> Encoded:
    return make_scaled(np.random.default_rng(rows * columns), rows, columns, block=(rows, columns), shape=())


@pytest.mark.parametrize(("make", "block"), [(fp8_block, [32, 32]), (fp8_tensor, None)])
def test_fp8(plain: Path, tmp_path: Path, make: Any, block: list[int] | None) -> None:
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    write_base(plain, tmp_path / "base", make, settings)
    config: Any = FineGrainedFP8Config(weight_block_size=block, dequantize=True)  # type: ignore[arg-type]
    model = auto.from_pretrained(tmp_path / "base", dtype=torch.float32, quantization_config=config).eval()
    check_weights(tmp_path / "base", model)
    check_logits(tmp_path / "base", model, tmp_path / "bundle")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_metal(plain: Path, tmp_path: Path, bits: int) -> None:
    def make(rows: int, columns: int) -> Encoded:
        return make_mlx(np.random.default_rng(rows * columns), rows, columns, bits=bits, bias="qbiases", dtype=np.float32)

    write_base(plain, tmp_path / "base", make, {"quant_method": "metal", "bits": bits, "group_size": 32})
    config: Any = MetalConfig(bits=bits, group_size=32, dequantize=True)
    model = auto.from_pretrained(tmp_path / "base", dtype=torch.float32, quantization_config=config, device_map={"": "cpu"})
    check_weights(tmp_path / "base", model, tolerance=1e-7)


def test_the_base_has_one_identity_however_it_is_stored(plain: Path, tmp_path: Path) -> None:
    """The hash is of the values that are read, so that a plain copy of a quantized base in float32 is the same base."""
    model = quantize(plain, tmp_path / "base", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = Base.open(tmp_path / "base")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(quantized.config), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, copy / "model.safetensors")
    assert Base.open(copy).sha256 == quantized.sha256 != Base.open(plain).sha256
