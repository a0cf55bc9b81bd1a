"""The exported graph computes what transformers computes, in float32 and from dequantized weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch

from edgelora_export.base.base import Base
from edgelora_export.quantize.int4 import quantize_rtn
from edgelora_runtime import Runtime
from edgelora_runtime.session.model import PREFILL_CHUNK, Model
from tests.tiny import build_variants, export_base, load_base, make_base, random_tokens, torch_logits

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_runtime.bundle.manifest import Manifest

TOLERANCE = 1e-3

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "tied mha": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "both biases, padded heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 12},
    "one layer": {"num_hidden_layers": 1},
    "three layers": {"num_hidden_layers": 3},
    "head 2": {"head_dim": 2},
    "head 8": {"head_dim": 8},
    "head 12": {"head_dim": 12},
    "head 20": {"head_dim": 20},
    "head 24 mha tied": {"head_dim": 24, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "head 80": {"head_dim": 80, "num_key_value_heads": 1},
    "head 64": {"head_dim": 64},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "llama3 rope, padded heads": {"rope_parameters": LLAMA3, "head_dim": 20},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "large theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "norm epsilon": {"rms_norm_eps": 0.1},
    "odd sizes": {"vocab_size": 307, "hidden_size": 60, "intermediate_size": 99, "head_dim": 14},
    "narrow": {"hidden_size": 8, "intermediate_size": 5, "head_dim": 2, "vocab_size": 301},
}


def stepwise(model: Model, tokens: list[int], *, prefix: int = 3) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits (T - prefix + 1, V): the prefix is read at once, the rest token by token through the KV cache."""
    cache = model.new_cache()
    rows = [model.read(cache, tokens[:prefix])[0].copy()]
    rows += [model.read(cache, [token])[0].copy() for token in tokens[prefix:]]
    return np.stack(rows)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_float32_export_gives_transformers_logits(shape: dict[str, Any], tmp_path: Path) -> None:
    theirs = make_base(tmp_path / "base", **shape)
    manifest = export_base(tmp_path / "base", tmp_path / "bundle")
    tokens = random_tokens(40)
    expected = torch_logits(theirs, tokens)
    assert expected.std() > 0.1, "logits that hardly differ would make any comparison pass"
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        assert np.abs(runtime.logits(tokens) - expected).max() <= TOLERANCE
    model = Model.open(tmp_path / "bundle" / "base.cpu.onnx", manifest.model, threads=1)
    assert np.abs(stepwise(model, tokens) - expected[2:]).max() <= TOLERANCE


def test_single_token_prompt(tmp_path: Path) -> None:
    theirs = make_base(tmp_path / "base")
    export_base(tmp_path / "base", tmp_path / "bundle")
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        assert np.abs(runtime.logits([7]) - torch_logits(theirs, [7])).max() <= TOLERANCE


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Manifest]:
    folder = tmp_path_factory.mktemp("long")
    theirs = make_base(folder / "base", max_position_embeddings=2048)
    return theirs, folder / "bundle", export_base(folder / "base", folder / "bundle")


def test_prompt_longer_than_a_prefill_chunk(long_model: tuple[Any, Path, Manifest]) -> None:
    theirs, bundle, manifest = long_model
    tokens = random_tokens(2 * PREFILL_CHUNK + 77)
    expected = torch_logits(theirs, tokens)
    with Runtime(bundle) as runtime:
        assert np.abs(runtime.logits(tokens) - expected).max() <= TOLERANCE
    model = Model.open(bundle / "base.cpu.onnx", manifest.model, threads=None)
    cache = model.new_cache()
    assert np.abs(model.read(cache, tokens)[0] - expected[-1]).max() <= TOLERANCE
    assert cache.tokens == tokens


def test_cache_growth_keeps_what_was_read(long_model: tuple[Any, Path, Manifest]) -> None:
    theirs, bundle, manifest = long_model
    tokens = random_tokens(540, seed=3)
    model = Model.open(bundle / "base.cpu.onnx", manifest.model, threads=1)
    cache = model.new_cache()
    model.read(cache, tokens[:250])
    capacities, rows = {cache.capacity}, []
    for token in tokens[250:]:
        rows.append(model.read(cache, [token])[0].copy())
        capacities.add(cache.capacity)
    assert capacities == {256, 512, 1024}
    assert np.abs(np.stack(rows) - torch_logits(theirs, tokens)[250:]).max() <= TOLERANCE


def test_two_caches_on_one_model_do_not_mix(long_model: tuple[Any, Path, Manifest]) -> None:
    theirs, bundle, manifest = long_model
    model = Model.open(bundle / "base.cpu.onnx", manifest.model, threads=1)
    texts = [random_tokens(30, seed=seed) for seed in (5, 6)]
    caches = [model.new_cache(), model.new_cache()]
    rows: list[list[Any]] = [[], []]
    for position in range(30):
        for text, cache, row in zip(texts, caches, rows, strict=True):
            row.append(model.read(cache, [text[position]])[0].copy())
    for text, row in zip(texts, rows, strict=True):
        assert np.abs(np.stack(row) - torch_logits(theirs, text)).max() <= TOLERANCE


def test_rewound_cache_reads_like_a_fresh_one(long_model: tuple[Any, Path, Manifest]) -> None:
    theirs, bundle, manifest = long_model
    model = Model.open(bundle / "base.cpu.onnx", manifest.model, threads=1)
    cache = model.new_cache()
    first, second = random_tokens(60, seed=7), random_tokens(60, seed=8)
    model.read(cache, first)
    cache.rewind(20)
    mixed = first[:20] + second[:15]
    assert np.abs(model.read(cache, second[:15])[0] - torch_logits(theirs, mixed)[-1]).max() <= TOLERANCE


@pytest.mark.parametrize("keep", [1, 2, 7, 33])
def test_logits_to_keep_is_the_tail_of_the_full_logits(long_model: tuple[Any, Path, Manifest], keep: int) -> None:
    theirs, bundle, manifest = long_model
    tokens = random_tokens(33)
    model = Model.open(bundle / "base.cpu.onnx", manifest.model, threads=1)
    kept = model.read(model.new_cache(), tokens, keep=keep)
    assert kept.shape == (keep, 300)
    assert np.abs(kept - torch_logits(theirs, tokens)[-keep:]).max() <= TOLERANCE


def test_without_logits_to_keep_the_graph_gives_all_logits(long_model: tuple[Any, Path, Manifest]) -> None:
    """A plain onnxruntime session without the optional inputs, as onnxruntime-genai runs it."""
    import onnxruntime as ort

    theirs, bundle, manifest = long_model
    session = ort.InferenceSession(bundle / "base.cpu.onnx", providers=["CPUExecutionProvider"])
    tokens = random_tokens(9)
    empty = np.zeros((1, manifest.model.kv_heads, 0, manifest.model.head_size), np.float32)
    feeds = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, 9), np.int64)}
    feeds |= {f"past_key_values.{i}.{kind}": empty for i in range(manifest.model.layers) for kind in ("key", "value")}
    logits, *presents, states = session.run(None, feeds)
    assert np.abs(logits[0] - torch_logits(theirs, tokens)).max() <= TOLERANCE
    assert {present.shape for present in presents} == {(1, manifest.model.kv_heads, 9, manifest.model.head_size)}
    assert states.shape == (1, 9, manifest.model.hidden_size)


def test_context_length_cuts_the_tables_not_the_numbers(tmp_path: Path) -> None:
    from edgelora_export.plan.variants import Quantization, Variant

    theirs = make_base(tmp_path / "base")
    build_variants(
        Base.open(tmp_path / "base"),
        [Variant("base")],
        tmp_path / "bundle",
        quantization=Quantization(bits=32),
        context_length=50,
    )
    tokens = random_tokens(50)
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        assert np.abs(runtime.logits(tokens) - torch_logits(theirs, tokens)).max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints(tmp_path: Path, dtype: torch.dtype) -> None:
    model: Any = make_base(tmp_path / "full").to(dtype)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_bytes((tmp_path / "full" / "tokenizer.json").read_bytes())
    export_base(tmp_path / "base", tmp_path / "bundle")
    tokens = random_tokens(20)
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        assert np.abs(runtime.logits(tokens) - torch_logits(load_base(tmp_path / "base"), tokens)).max() <= TOLERANCE


def test_sharded_checkpoint_is_the_same_base(tmp_path: Path) -> None:
    model = make_base(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert Base.open(tmp_path / "sharded").sha256 == Base.open(tmp_path / "whole").sha256


QUANTIZED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    f"int{bits} block {block} {'symmetric' if symmetric else 'asymmetric'} {name}": (
        {"bits": bits, "block_size": block, "symmetric": symmetric},
        shape,
    )
    for bits, block, symmetric, name, shape in (
        (4, 32, True, "tied", {"tie_word_embeddings": True}),
        (4, 32, False, "tied", {"tie_word_embeddings": True}),
        (4, 16, True, "untied", {}),
        (4, 16, False, "untied", {}),
        (4, 64, True, "odd sizes", SHAPES["odd sizes"]),
        (4, 64, False, "odd sizes", SHAPES["odd sizes"]),
        (4, 128, True, "wider than the weights", {"tie_word_embeddings": True}),
        (4, 128, False, "wider than the weights", {}),
        (4, 32, True, "biases, head 12", SHAPES["both biases, padded heads"]),
        (8, 16, True, "tied", {"tie_word_embeddings": True}),
        (8, 32, True, "untied", {}),
        (8, 32, False, "tied, odd sizes", {**SHAPES["odd sizes"], "tie_word_embeddings": True}),
        (8, 128, False, "untied", {}),
    )
}


@pytest.mark.parametrize(("grid", "shape"), QUANTIZED.values(), ids=QUANTIZED.keys())
def test_quantized_export_gives_logits_of_the_dequantized_weights(
    grid: dict[str, Any], shape: dict[str, Any], tmp_path: Path
) -> None:
    """The reference is transformers with the dequantized weights.

    With activations left in float32 (accuracy_level 1) nothing else differs. The exported graph (accuracy_level 4) rounds
    activations to int8 per block, an error of up to absmax/254 per entry, about 1% of a product's spread. Over nine products in
    a row, that is 2-3% of the logits' spread in the root mean square; 5% is allowed. A wrong scale, zero point or nibble order
    costs 50% or more.
    """
    theirs = make_base(tmp_path / "base", **shape)
    manifest = export_base(tmp_path / "base", tmp_path / "bundle", **grid)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim == 2:
                codes = quantize_rtn(padded_heads(name, parameter.numpy(), theirs.config), **grid)
                parameter.copy_(torch.from_numpy(unpadded_heads(name, codes.dequantize(), theirs.config)))
    tokens = random_tokens(40)
    expected = torch_logits(theirs, tokens)
    exact = Model.open(keep_float_activations(tmp_path / "bundle" / "base.cpu.onnx"), manifest.model, threads=1)
    assert np.abs(exact.read(exact.new_cache(), tokens, keep=len(tokens)) - expected).max() <= TOLERANCE
    (tmp_path / "bundle" / "exact.onnx").unlink()
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        assert np.sqrt(np.square(runtime.logits(tokens) - expected).mean()) <= 0.05 * expected.std()


def keep_float_activations(graph: Path) -> Path:
    """Writes exact.onnx beside a graph: the same graph, but its quantized products leave activations in float32."""
    model = onnx.load(graph, load_external_data=False)
    levels = [entry for node in model.graph.node for entry in node.attribute if entry.name == "accuracy_level"]
    assert {level.i for level in levels} == {4}
    for level in levels:
        level.i = 1
    copy = graph.with_name("exact.onnx")
    copy.write_bytes(model.SerializeToString())
    return copy


def padded_heads(name: str, weight: Any, config: Any) -> Any:
    """The weight with o_proj's columns padded head by head, as in the graph, where blocks span the padding."""
    if not name.endswith("o_proj.weight") or config.head_dim % 16 == 0:
        return weight
    size, padded = config.head_dim, -(-config.head_dim // 16) * 16
    heads = weight.reshape(len(weight), -1, size)
    return np.pad(heads, ((0, 0), (0, 0), (0, padded - size))).reshape(len(weight), -1)


def unpadded_heads(name: str, weight: Any, config: Any) -> Any:
    if not name.endswith("o_proj.weight") or config.head_dim % 16 == 0:
        return weight
    padded = -(-config.head_dim // 16) * 16
    return weight.reshape(len(weight), -1, padded)[:, :, : config.head_dim].reshape(len(weight), -1)


def test_int4_prefill_and_decode_agree(bundle4: Path) -> None:
    from edgelora_runtime import Bundle

    manifest = Bundle.open(bundle4).manifest
    tokens = random_tokens(40)
    model = Model.open(bundle4 / "base.cpu.onnx", manifest.model, threads=1)
    whole = model.read(model.new_cache(), tokens, keep=len(tokens)).copy()
    apart = stepwise(model, tokens) - whole[2:]
    # onnxruntime has different kernels for one row and for many. On some CPUs they round activations differently: with AVX2,
    # single logits differ by 7% of the spread, and by 0.5% in the root mean square.
    assert np.sqrt(np.square(apart).mean()) <= 0.01 * whole.std()
    assert np.abs(apart).max() <= 0.2 * whole.std()
