"""A GGUF file of each architecture gives the weights, the config and the logits of the model that it was written from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from edgelora_export.architectures import native_types
from edgelora_export.base.base import Base
from edgelora_export.base.gguf.names import BLOCKS
from edgelora_export.quantize.int4 import quantize_rtn, unpack_codes
from edgelora_runtime import Runtime
from tests.gguf_files import write_gguf
from tests.tiny import export_base, make_base, random_tokens, torch_logits

if TYPE_CHECKING:
    from pathlib import Path

TOLERANCE = 2e-4
TOKENS = random_tokens(40)  # several windows long
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.05 * pair for pair in range(6)],
    "long_factor": [1.0 + 0.5 * pair for pair in range(6)],
}
GEMMA = {"head_dim": 32, "tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 7, "pad_token_id": None}
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama, other head size, tied": (LlamaConfig, {"head_dim": 32, "tie_word_embeddings": True}),
    "llama, biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama, linear rope": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama 3.2": (LlamaConfig, {"rope_parameters": LLAMA3, "head_dim": 32, "max_position_embeddings": 16384}),
    "llama 3, other bounds": (
        LlamaConfig,
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64, "high_freq_factor": 3.0}, "head_dim": 32},
    ),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "phi3": (Phi3Config, {"sliding_window": 7, "pad_token_id": None}),
    "phi3, long rope, partly rotary": (
        Phi3Config,
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64, "pad_token_id": None},
    ),
    "gemma2": (Gemma2Config, {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        Gemma3TextConfig,
        {
            **GEMMA,
            "num_hidden_layers": 4,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "smollm3": (SmolLM3Config, {"num_hidden_layers": 4, "tie_word_embeddings": True, "pad_token_id": None}),
    "granite": (
        GraniteConfig,
        {"embedding_multiplier": 6.0, "attention_multiplier": 0.1, "residual_multiplier": 0.22, "logits_scaling": 0.5},
    ),
    "olmo2": (Olmo2Config, {}),
}
EACH = pytest.mark.parametrize(("config_class", "settings"), SHAPES.values(), ids=SHAPES.keys())


def load_in_torch(base: Base) -> Any:
    """The base's tensors in transformers' class for the base's config."""
    settings = {key: value for key, value in base.config.items() if key != "model_type"}
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(base.config["model_type"], **settings)).float().eval()
    state = {name: torch.from_numpy(np.ascontiguousarray(base.tensor(name))) for name in base.tensors.files}
    kept = model.load_state_dict(state, strict=False)
    assert set(kept.missing_keys) <= ({"lm_head.weight"} if base.config["tie_word_embeddings"] else set())
    assert not kept.unexpected_keys
    model.tie_weights()
    return model


@EACH
def test_logits_are_those_of_the_model_before(config_class: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = make_base(tmp_path / "base", config_class=config_class, **settings)
    path = write_gguf(tmp_path / "base", tmp_path / "model.gguf")
    expected = torch_logits(theirs, TOKENS)
    assert expected.std() > 0.1, "logits that hardly differ would make any comparison pass"
    ours, folder = Base.open(path), Base.open(tmp_path / "base")
    assert set(ours.tensors.files) == set(folder.tensors.files)
    for name in ours.tensors.files:
        assert ours.tensors.shape(name) == folder.tensors.shape(name)
        assert np.abs(ours.tensor(name) - folder.tensor(name)).max() <= 1e-6, name
    assert np.abs(torch_logits(load_in_torch(ours), TOKENS) - expected).max() <= TOLERANCE
    export_base(path, tmp_path / "bundle")
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        assert np.abs(runtime.logits(TOKENS) - expected).max() <= TOLERANCE


def test_llama3_rope_comes_back_as_such(tmp_path: Path) -> None:
    """Llama 3.2's divisors are those of its published settings; others are carried as they are."""
    for name, kind in (("llama 3.2", "llama3"), ("llama 3, other bounds", "longrope")):
        make_base(tmp_path / name, **SHAPES[name][1])
        base = Base.open(write_gguf(tmp_path / name, tmp_path / f"{name}.gguf"))
        assert base.config["rope_parameters"]["rope_type"] == kind
        if kind == "llama3":
            assert base.config["rope_parameters"] == LLAMA3


def test_every_native_architecture_is_read() -> None:
    """Mistral is llama in GGUF; Ministral 3 is not read yet."""
    assert {"mistral", *BLOCKS} - {"gemma3"} | {"gemma3_text"} >= set(native_types()) - {"ministral3"}


@pytest.mark.parametrize(
    "kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0], ids=lambda kind: kind.name
)
def test_types_are_read_as_the_gguf_package_reads_them(kind: Kind, tmp_path: Path) -> None:
    """Whole and by rows, with the permutation of queries and keys undone."""
    make_base(tmp_path / "base")
    path = write_gguf(tmp_path / "base", tmp_path / "model.gguf", kind=kind)
    base = Base.open(path)
    theirs = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    from gguf import dequantize

    for name, source, heads in (
        ("model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight", 2),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight", 0),
        ("model.embed_tokens.weight", "token_embd.weight", 0),
    ):
        expected = dequantize(theirs[source].data, kind)
        if heads:
            rows = expected.shape[0]
            expected = expected.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows, -1)
        assert np.array_equal(base.tensor(name), expected)
        assert np.array_equal(base.rows(name, 3, 14), expected[3:14])
        assert base.tensors.read(name).dtype == base.tensors.dtype(name)


@pytest.mark.parametrize(
    "kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_NL, Kind.IQ2_S], ids=lambda k: k.name
)
def test_types_that_only_llama_cpp_writes_are_dequantized(kind: Kind, tmp_path: Path) -> None:
    """The bytes of the codes are random; each scale is a half precision number that is finite."""
    from gguf import GGML_QUANT_SIZES, dequantize

    make_base(tmp_path / "base", hidden_size=256)
    block, size = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (96, 256 // block * size), dtype=np.uint8)

    def add(writer: Any) -> None:
        for part in writer.tensors:
            if "blk.0.ffn_up.weight" in part:
                part.pop("blk.0.ffn_up.weight")
        writer.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=kind)

    base = Base.open(write_gguf(tmp_path / "base", tmp_path / "model.gguf", change=add))
    assert np.array_equal(base.tensor("model.layers.0.mlp.up_proj.weight"), dequantize(raw, kind))


def test_q4_0_codes_are_kept_by_rounding_to_nearest() -> None:
    """llama.cpp puts the extreme of each block on code 0, where edgelora's grid has it, too."""
    from gguf import dequantize
    from gguf.quants import quantize

    weight = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    packed = quantize(weight, Kind.Q4_0)
    ours = quantize_rtn(np.asarray(dequantize(packed, Kind.Q4_0), np.float32), bits=4, block_size=32)
    blocks = packed.reshape(64, 4, 18)
    theirs = np.concatenate([blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4], axis=2)  # first and second half of a block
    assert np.array_equal(unpack_codes(ours.codes, 4), theirs)
    assert np.array_equal(ours.scales, blocks[:, :, :2].copy().view(np.float16)[:, :, 0].astype(np.float32))


def test_split_files_are_read_whole(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    whole = Base.open(write_gguf(tmp_path / "base", tmp_path / "whole.gguf"))
    write_gguf(tmp_path / "base", tmp_path / "model.gguf", split_max_tensors=8, small_first_shard=True)
    parts = sorted(tmp_path.glob("model-*-of-*.gguf"))
    assert len(parts) > 2
    for part in (parts[0], parts[-1]):
        assert Base.open(part).sha256 == whole.sha256
        assert Base.open(part).config == whole.config


def test_texts_are_what_transformers_saves(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    base = Base.open(write_gguf(tmp_path / "base", tmp_path / "model.gguf"))
    assert list(base.texts) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads(base.texts["config.json"]) == base.config
    assert base.texts["chat_template.jinja"] == (tmp_path / "base" / "chat_template.jinja").read_bytes()
    assert json.loads(base.texts["generation_config.json"])["eos_token_id"] == 1
