"""Every architecture computes what transformers computes: whole and layer by layer, with and without adapters."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from edgelora.adapters.folder import Adapter
from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.bundle.gate import Gate
from edgelora_export.plan.calibration import Calibration, Sample
from edgelora_export.plan.variants import Quantization, Variant
from edgelora_export.stream.layer_graph import HIDDEN, build_head_graph, build_layer_graph
from edgelora_export.weights.merged import read_bias, read_linear, read_norm
from edgelora_runtime import Runtime
from edgelora_runtime.bundle.manifest import AdapterEntry
from edgelora_runtime.errors import InputError
from edgelora_runtime.session.model import PREFILL_CHUNK, Model
from tests.tiny import LINEARS, build_variants, export_base, load_base, make_adapter, make_base, random_tokens, torch_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOLERANCE = 2e-4
WINDOW = 7
TOKENS = random_tokens(40)  # several windows long

LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}


def long_rope(pairs: int, **settings: Any) -> dict[str, Any]:
    """Long RoPE whose factors differ from pair to pair, and between short and long."""
    short, long = ((1.0 + step * np.arange(pairs)).tolist() for step in (0.05, 0.5))
    return {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long, **settings}


def yarn(**settings: Any) -> dict[str, Any]:
    """YaRN whose original context is a few tokens, so that its pairs differ."""
    return {"rope_type": "yarn", "rope_theta": 300.0, "factor": 8.0, "original_max_position_embeddings": 128, **settings}


def ministral(**settings: Any) -> dict[str, Any]:
    """YaRN and query scales that change every eleven tokens."""
    return yarn(original_max_position_embeddings=11, llama_4_scaling_beta=0.4, mscale=1.0, mscale_all_dim=1.0, **settings)


GEMMA = {"num_key_value_heads": 2, "tie_word_embeddings": True, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama, yarn": (LlamaConfig, {"rope_parameters": yarn()}),
    "ministral3": (Ministral3Config, {"head_dim": 16, "rope_parameters": ministral()}),
    "ministral3, padded heads, windows": (
        Ministral3Config,
        {"head_dim": 20, "sliding_window": WINDOW, "rope_parameters": ministral(attention_factor=1.2)},
    ),
    "mistral": (MistralConfig, {"sliding_window": WINDOW}),
    "mistral, padded heads": (MistralConfig, {"sliding_window": 1, "head_dim": 20}),
    "mistral without a window": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen2, windows from layer 1 on, padded heads": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "hidden_size": 48},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "qwen3, yarn with its own turns": (
        Qwen3Config,
        {"head_dim": 32, "rope_parameters": yarn(beta_fast=9.0, beta_slow=2.0, truncate=False, mscale=0.7, mscale_all_dim=1.5)},
    ),
    "qwen3, padded heads, biases": (Qwen3Config, {"head_dim": 20, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3, padded heads, large epsilon": (Qwen3Config, {"head_dim": 12, "rms_norm_eps": 0.3, "num_key_value_heads": 1}),
    "phi3": (Phi3Config, {"sliding_window": WINDOW}),
    "phi3, padded heads": (Phi3Config, {"hidden_size": 80}),
    "phi3, long rope, partly rotary": (
        Phi3Config,
        {
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
            "rope_parameters": long_rope(6, partial_rotary_factor=0.75),
        },
    ),
    "phi3, long rope, partly rotary, padded heads": (
        Phi3Config,
        {
            "hidden_size": 80,
            "original_max_position_embeddings": 64,
            "rope_parameters": long_rope(6, partial_rotary_factor=0.6, attention_factor=1.3),
        },
    ),
    "gemma2": (Gemma2Config, {**GEMMA, "head_dim": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2, padded heads, no caps": (
        Gemma2Config,
        {**GEMMA, "head_dim": 20, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            **GEMMA,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": LINEAR_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma3, padded heads": (Gemma3TextConfig, {**GEMMA, "head_dim": 20, "sliding_window_pattern": 2, "rms_norm_eps": 0.1}),
    "smollm3": (SmolLM3Config, {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "smollm3, padded heads, windows": (
        SmolLM3Config,
        {"hidden_size": 48, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "granite": (
        GraniteConfig,
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 0.5,
            "rms_norm_eps": 0.01,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "olmo2": (Olmo2Config, {}),
    "olmo2, padded heads": (Olmo2Config, {"hidden_size": 48, "rms_norm_eps": 0.1, "num_key_value_heads": 1}),
}
EACH = pytest.mark.parametrize(("config_class", "settings"), SHAPES.values(), ids=SHAPES.keys())
SPECIAL: dict[str, Any] = {"pad_token_id": None}  # some configs' default exceeds the tests' vocabulary


def make(folder: Path, config_class: Any, settings: dict[str, Any]) -> Any:
    return make_base(folder, config_class=config_class, **SPECIAL, **settings)


def stepwise(model: Model, tokens: list[int]) -> Any:
    """Logits (T, V), token by token through the KV cache."""
    cache = model.new_cache()
    return np.stack([model.read(cache, [token])[0].copy() for token in tokens])


@EACH
def test_float32_export_gives_transformers_logits(config_class: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = make(tmp_path / "base", config_class, settings)
    manifest = export_base(tmp_path / "base", tmp_path / "bundle")
    expected = torch_logits(theirs, TOKENS)
    assert expected.std() > 0.1, "logits that hardly differ would make any comparison pass"
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        assert np.abs(runtime.logits(TOKENS) - expected).max() <= TOLERANCE
    model = Model.open(tmp_path / "bundle" / "base.cpu.onnx", manifest.model, threads=1)
    assert np.abs(stepwise(model, TOKENS) - expected).max() <= TOLERANCE
    cache = model.new_cache()
    model.read(cache, TOKENS[:19])
    assert np.abs(model.read(cache, TOKENS[19:], keep=21) - expected[19:]).max() <= TOLERANCE


@pytest.mark.parametrize("window", [PREFILL_CHUNK // 2, PREFILL_CHUNK + 88])
def test_windows_reach_across_prefill_chunks(window: int, tmp_path: Path) -> None:
    theirs = make(tmp_path / "base", MistralConfig, {"sliding_window": window})
    manifest = export_base(tmp_path / "base", tmp_path / "bundle")
    tokens = random_tokens(2 * PREFILL_CHUNK - 100)
    model = Model.open(tmp_path / "bundle" / "base.cpu.onnx", manifest.model, threads=1)
    ours = model.read(model.new_cache(), tokens, keep=100)
    assert np.abs(ours - torch_logits(theirs, tokens)[-100:]).max() <= TOLERANCE


@EACH
def test_int4_export_runs(config_class: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = make(tmp_path / "base", config_class, settings)
    manifest = export_base(tmp_path / "base", tmp_path / "bundle", bits=4, block_size=16)
    expected = torch_logits(theirs, TOKENS)
    model = Model.open(tmp_path / "bundle" / "base.cpu.onnx", manifest.model, threads=1)
    whole = model.read(model.new_cache(), TOKENS, keep=len(TOKENS)).copy()
    assert np.corrcoef(whole.ravel(), expected.ravel())[0, 1] > 0.7
    assert np.abs(stepwise(model, TOKENS) - whole).max() <= 0.05 * whole.std()


@EACH
def test_gptq_streams_and_the_gate_measures(config_class: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """8 bits lose almost nothing, so the gate's streamed teacher must agree with onnxruntime."""
    make(tmp_path / "base", config_class, settings)
    samples = [Sample(tuple(random_tokens(40, seed=seed))) for seed in range(12)]
    manifest = build_variants(
        Base.open(tmp_path / "base"),
        [Variant("base")],
        tmp_path / "bundle",
        quantization=Quantization(bits=8, block_size=16),
        base_calibration=Calibration(tuple(samples[2:]), tuple(samples[:2])),
        gate=Gate(),
    )
    found = manifest.variants["base"].fidelity
    assert found is not None
    assert found.tokens == 2 * 39
    assert 0 < found.kl_mean < 0.02
    assert found.perplexity == pytest.approx(found.teacher_perplexity, rel=0.05)


@EACH
def test_layers_one_by_one_give_transformers_hidden_states(config_class: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = make(tmp_path / "base", config_class, settings)
    base = Base.open(tmp_path / "base")
    decoder = read_decoder(base.config)
    weights = dict(decoder.rotary_tables) | {norm.name: read_norm(base, norm) for norm in decoder.norms}
    weights |= {linear.name: read_linear(base, linear, None) for linear in decoder.linears}
    weights["embedding" if decoder.tied else "head"] = base.tensor(decoder.head)
    weights |= {f"{linear.name}.bias": read_bias(base, linear) for linear in decoder.linears if linear.bias}
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS]), output_hidden_states=True)
    unit = getattr(theirs.config, "residual_multiplier", 1.0)  # the graph's residual is Granite's in this unit
    hidden = base.tensor(decoder.embedding)[TOKENS][None] * np.float32(decoder.embedding_multiplier)
    for index, layer in enumerate(decoder.layers):
        np.testing.assert_allclose(hidden * unit, expected.hidden_states[index].numpy(), atol=TOLERANCE)
        graph = build_layer_graph(decoder, index, [linear.name for linear in layer.linears])
        hidden, *taps = run(graph.model, {HIDDEN: hidden} | {name: weights[full] for full, name in graph.weights.items()})
        assert [tap.shape[-1] for tap in taps] == [linear.columns for linear in layer.linears]
    graph = build_head_graph(decoder)
    (logits,) = run(graph.model, {HIDDEN: hidden} | {name: weights[full] for full, name in graph.weights.items()})
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=TOLERANCE)


def run(graph: ir.Model, feeds: dict[str, Any]) -> list[Any]:
    session = ort.InferenceSession(ir.serde.serialize_model(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "smollm3"])
def test_layers_of_a_kind_share_one_graph(name: str, tmp_path: Path) -> None:
    config_class, settings = SHAPES[name]
    make(tmp_path / "base", config_class, {**settings, "num_hidden_layers": 4})
    decoder = read_decoder(Base.open(tmp_path / "base").config)
    graphs = [ir.serde.serialize_model(build_layer_graph(decoder, index).model).SerializeToString() for index in range(4)]
    assert graphs[0] == graphs[2] != graphs[1] == graphs[3]


FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("phi3", FUSED),
        ("phi3, long rope, partly rotary, padded heads", FUSED),
        ("phi3", ["qkv_proj"]),
        ("qwen3, padded heads, biases", None),
        ("ministral3, padded heads, windows", None),
        ("gemma2, padded heads, no caps", None),
        ("gemma3", None),
        ("olmo2, padded heads", None),
    ],
)
def test_adapters_merged_and_live_give_peft_logits(name: str, targets: list[str] | None, tmp_path: Path) -> None:
    config_class, settings = SHAPES[name]
    bare = torch_logits(make(tmp_path / "base", config_class, settings), TOKENS)
    make_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=targets or list(LINEARS))
    round_to_half(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = torch_logits(PeftModel.from_pretrained(load_base(tmp_path / "base"), str(tmp_path / "adapter")), TOKENS)
    assert np.abs(expected - bare).max() > 0.1
    adapter = Adapter.open(tmp_path / "adapter")
    build_variants(
        Base.open(tmp_path / "base"),
        [Variant("merged", {"a": 1.0}, delta=adapter), Variant("fed", {"a": 1.0}, live={"a": 1.0})],
        tmp_path / "bundle",
        quantization=Quantization(bits=32),
        adapters={"a": AdapterEntry(adapter.sha256, adapter.rank, None)},
        live_adapters={"a": adapter},
    )
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        assert np.abs(runtime.logits(TOKENS, variant="merged") - expected).max() <= TOLERANCE
        assert np.abs(runtime.logits(TOKENS, variant="fed") - expected).max() <= TOLERANCE


def round_to_half(file: Path) -> None:
    """Rounds an adapter's factors to fp16, as bundles store live adapters; the scale is a power of two here."""
    save_file({name: values.astype(np.float16).astype(np.float32) for name, values in load_file(file).items()}, file)


def test_long_rope_takes_the_long_factors_beyond_the_original_context(tmp_path: Path) -> None:
    """Like transformers for a text longer than that. The bundle's default context is the original one."""
    settings = {"original_max_position_embeddings": 30, "rope_parameters": long_rope(8)}
    theirs = make(tmp_path / "base", Phi3Config, settings)
    base = Base.open(tmp_path / "base")
    assert read_decoder(base.config).context_length == 30
    build_variants(
        base,
        [Variant("base")],
        tmp_path / "bundle",
        quantization=Quantization(bits=32),
        context_length=31,
    )
    tokens = random_tokens(31)
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        assert np.abs(runtime.logits(tokens) - torch_logits(theirs, tokens)).max() <= TOLERANCE


def flatten_gemma3(config: dict[str, Any]) -> None:
    """Rewrites a config in the form of transformers 4."""
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["rope_local_base_freq"] = (
        rope[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention")
    )
    config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    config.pop("layer_types")
    config["sliding_window_pattern"] = 2


def flatten_phi3(config: dict[str, Any]) -> None:
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["partial_rotary_factor"] = rope["rope_theta"], 0.75
    config["rope_scaling"] = {"type": "su", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}


@pytest.mark.parametrize(("name", "flatten"), [("gemma3", flatten_gemma3), ("phi3, long rope, partly rotary", flatten_phi3)])
def test_configs_of_transformers_4_mean_the_same(name: str, flatten: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    make(tmp_path / "base", *SHAPES[name])
    config = Base.open(tmp_path / "base").config
    new = read_decoder(config)
    flatten(config)
    old = read_decoder(config)
    assert old.layers == new.layers
    assert old.rotary_tables.keys() == new.rotary_tables.keys()
    for table, values in new.rotary_tables.items():
        np.testing.assert_array_equal(old.rotary_tables[table], values)


SILENT: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma2": (Gemma2Config, {}),
    "gemma3": (Gemma3TextConfig, {"num_hidden_layers": 7}),
    "granite": (GraniteConfig, {}),
    "llama": (LlamaConfig, {}),
    "ministral3": (Ministral3Config, {}),
    "mistral": (MistralConfig, {}),
    "olmo2": (Olmo2Config, {}),
    "phi3": (Phi3Config, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen2 with windows": (Qwen2Config, {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3 with windows": (Qwen3Config, {"use_sliding_window": True, "max_window_layers": 3}),
    "smollm3": (SmolLM3Config, {}),
    "smollm3 with windows": (SmolLM3Config, {"use_sliding_window": True, "sliding_window": 9}),
}


@pytest.mark.parametrize(("config_class", "settings"), SILENT.values(), ids=SILENT.keys())
def test_silent_configs_mean_what_transformers_assumes(config_class: Any, settings: dict[str, Any]) -> None:
    """Configs on the Hub often omit a key whose value is the class's default."""
    sizes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 50}
    sizes |= settings
    full = config_class(**sizes).to_dict()
    silent = read_decoder({"model_type": full["model_type"], **sizes})
    spoken = read_decoder(full)
    for name in (field.name for field in fields(spoken) if field.name != "rotary_tables"):
        assert getattr(silent, name) == getattr(spoken, name), name
    assert silent.rotary_tables.keys() == spoken.rotary_tables.keys()
    for table, values in spoken.rotary_tables.items():
        np.testing.assert_array_equal(silent.rotary_tables[table], values)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("gemma2", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
    "dynamic rope": ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
    "yarn without a factor": ("qwen2", {"rope_parameters": {"rope_type": "yarn"}}, "yarn and lack factor"),
    "no query scale": ("ministral3", {"rope_parameters": yarn()}, "llama_4_scaling_beta"),
    "bidirectional": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "no factor": ("llama", {"rope_parameters": {"rope_type": "linear"}}, "lack factor"),
    "partly rotary": ("llama", {"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor"),
    "chunked layers": ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
    "too few kinds": ("qwen3", {"layer_types": ["full_attention"]}, "layer_types"),
    "no window": ("gemma2", {"sliding_window": None}, "sliding_window is None"),
    "too few turns": ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
    "no residual": ("granite", {"residual_multiplier": 0.0}, "residual_multiplier"),
    "too few factors": ("phi3, long rope, partly rotary", {"rope_parameters": long_rope(5)}, "short_factor"),
    "odd heads": ("llama", {"head_dim": 15}, "must be even"),
}


@pytest.mark.parametrize(("name", "change", "mention"), REFUSED.values(), ids=REFUSED.keys())
def test_settings_without_an_equivalent_are_refused(name: str, change: dict[str, Any], mention: str, tmp_path: Path) -> None:
    config_class, settings = SHAPES[name]
    config = {**make(tmp_path / "base", config_class, settings).config.to_dict(), **change}
    with pytest.raises(InputError, match=mention):
        read_decoder(config)
