"""Graphs of the gpu target: fp16 activations over the cpu graphs' codes. The CPU provider runs them here, so no GPU is needed."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora_export.base.base import Base
from edgelora_export.plan.variants import Quantization, Variant
from edgelora_export.quantize.int4 import quantize_rtn
from edgelora_runtime import Bundle, Runtime
from edgelora_runtime.errors import InputError
from tests.export.architectures.test_architectures import SHAPES, make
from tests.tiny import build_variants, load_base, make_adapter, make_base, random_tokens, torch_logits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgelora_runtime.bundle.manifest import Manifest

BOTH = ("cpu", "gpu")
TOKENS = random_tokens(40)
END = 1


def export_both(base: Path, output: Path, **quantization: Any) -> Manifest:
    """The bare base for both targets, rounded to nearest."""
    settings = Quantization(**{"method": "rtn", **quantization})
    return build_variants(Base.open(base), [Variant("base")], output, quantization=settings, targets=BOTH)


def gpu_runtime(bundle: Path) -> Runtime:
    return Runtime(bundle, threads=1, provider="cpu", target="gpu")


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The tokens that a model writes greedily before its end token, without a KV cache."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (token := int(torch_logits(model, tokens)[-1].argmax())) != END:
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def bundle(tiny_base: Path, tiny_adapters: dict[str, Path]) -> Path:
    """Merged and live int4 variants for both targets; one changes only the attention."""
    output = tiny_base.parent / "bundle-gpu"
    variants = {
        "base": VariantRecipe({}),
        "all": VariantRecipe({"plain": 1.0}),
        "attention": VariantRecipe({"attention": 1.0}),
        "plain-live": VariantRecipe({"plain": 1.0}, "live"),
        "mixed": VariantRecipe({"plain": 0.6, "attention": -0.4}, "live"),
    }
    adapters = {name: tiny_adapters[name] for name in ("plain", "attention")}
    export(Recipe(str(tiny_base), adapters, variants, Quantization(), targets=BOTH), output, gate="off")
    return output


def tensors(path: Path) -> dict[str, ir.ExternalTensor]:
    """A graph's external tensors, by the initializer's name."""
    values = ir.load(path).graph.initializers.items()
    return {name: value.const_value for name, value in values if isinstance(value.const_value, ir.ExternalTensor)}


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_stored_once(symmetric: bool, tiny_base: Path, tmp_path: Path) -> None:
    manifest = export_both(tiny_base, tmp_path / "bundle", symmetric=symmetric)
    cpu, gpu = (tensors(tmp_path / "bundle" / f"base.{target}.onnx") for target in BOTH)
    assert cpu.keys() == gpu.keys()
    halved = 0  # bytes
    for name, tensor in gpu.items():
        if tensor.dtype == ir.DataType.UINT8:
            assert (tensor.location, tensor.offset, tensor.length) == (cpu[name].location, cpu[name].offset, cpu[name].length)
        else:
            assert tensor.dtype == ir.DataType.FLOAT16
            np.testing.assert_array_equal(tensor.numpy(), cpu[name].numpy().astype(np.float16))
            halved += tensor.nbytes
    blobs = {target: set(manifest.variants["base"].graphs[target].blobs) for target in BOTH}
    codes = {tensor.location for tensor in cpu.values() if tensor.dtype == ir.DataType.UINT8}
    assert blobs["cpu"] & blobs["gpu"] == codes
    added = sum(manifest.files[name].size for name in blobs["gpu"] - blobs["cpu"])
    assert halved <= added <= halved + 64 * len(gpu)  # alignment


def test_variants_share_scales_that_they_do_not_change(bundle: Path) -> None:
    """An attention adapter does not change the MLP's scales, the norms and the tables, in fp16 and in float32."""
    base, changed = (tensors(bundle / f"{name}.gpu.onnx") for name in ("base", "attention"))
    own = {name for name, tensor in changed.items() if tensor.location != base[name].location}
    assert own == {
        f"layers.{index}.attention.{product}.{part}"
        for index in range(2)
        for product in ("qkv", "output")
        for part in ("codes", "scales")
    }


def test_the_manifest_lists_both_graphs(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    for name, entry in manifest.variants.items():
        stem = "live" if entry.kind == "live" else name
        assert {target: graph.file for target, graph in entry.graphs.items()} == {
            target: f"{stem}.{target}.onnx" for target in BOTH
        }
    assert not Bundle.open(bundle).verify()


@pytest.mark.parametrize("name", ["all", "live"])
@pytest.mark.parametrize("target", BOTH)
def test_onnxs_checker_accepts_the_graph(target: str, name: str, bundle: Path, tmp_path: Path) -> None:
    """Except for SimplifiedLayerNormalization, which onnxruntime defines in ONNX's own domain and ONNX does not."""
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    model = onnx.load(folder / f"{name}.{target}.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    onnx.save(model, folder / "checked.onnx")
    onnx.checker.check_model(folder / "checked.onnx", full_check=True)


EACH = pytest.mark.parametrize(("config_class", "settings"), SHAPES.values(), ids=SHAPES.keys())


def check_inferred_outputs(bundle: Path, manifest: Manifest) -> None:
    """onnxruntime infers types and shapes node by node, by the schemas of its own ops too; here nothing declares them."""
    model = onnx.load(bundle / "base.gpu.onnx", load_external_data=False)
    for output in model.graph.output:
        output.ClearField("type")
    onnx.save(model, bundle / "undeclared.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(bundle / "undeclared.onnx", options, providers=["CPUExecutionProvider"])
    (bundle / "undeclared.onnx").unlink()
    entry = manifest.model
    for value in session.get_outputs():
        if value.name == "logits":
            assert (value.type, value.shape[-1]) == ("tensor(float)", entry.vocab_size)
        else:
            assert value.type == "tensor(float16)"
        if value.name.startswith("present"):
            assert [value.shape[axis] for axis in (0, 1, 3)] == ["B", entry.kv_heads, entry.head_size]
    assert {value.type for value in session.get_inputs()} == {"tensor(int64)", "tensor(float16)"}


@EACH
def test_fp16_is_as_near_to_float32_as_torchs_own_fp16(config_class: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = make(tmp_path / "base", config_class, settings)
    check_inferred_outputs(tmp_path / "bundle", export_both(tmp_path / "base", tmp_path / "bundle", bits=32))
    expected, prompt = torch_logits(theirs, TOKENS), random_tokens(7, seed=3)
    written = greedy(theirs, prompt, 8)
    rounding = np.abs(torch_logits(theirs.half(), TOKENS) - expected).max()
    with gpu_runtime(tmp_path / "bundle") as runtime:
        assert np.abs(runtime.logits(TOKENS) - expected).max() <= 1.5 * rounding
        assert list(runtime.generate(prompt, max_tokens=8).tokens) == written


@EACH
def test_int4_graphs_run(config_class: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = make(tmp_path / "base", config_class, settings)
    check_inferred_outputs(tmp_path / "bundle", export_both(tmp_path / "base", tmp_path / "bundle", bits=4, block_size=16))
    with gpu_runtime(tmp_path / "bundle") as runtime:
        assert np.corrcoef(runtime.logits(TOKENS).ravel(), torch_logits(theirs, TOKENS).ravel())[0, 1] > 0.7


@pytest.mark.parametrize(
    "grid",
    [{}, {"symmetric": False}, {"block_size": 16, "symmetric": False}, {"bits": 8}],
    ids=["int4", "int4 asymmetric", "int4 block 16", "int8"],
)
def test_quantized_graphs_compute_with_the_weights_that_the_codes_stand_for(grid: dict[str, Any], tmp_path: Path) -> None:
    """Unlike on the CPU, activations are not rounded to int8, so the reference is torch with the dequantized weights."""
    theirs = make_base(tmp_path / "base", tie_word_embeddings=True)
    export_both(tmp_path / "base", tmp_path / "bundle", **grid)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 2:
                settings = {"bits": 4, "block_size": 32, "symmetric": True, **grid}
                parameter.copy_(torch.from_numpy(quantize_rtn(parameter.numpy(), **settings).dequantize()))
    expected = torch_logits(theirs, TOKENS)
    with gpu_runtime(tmp_path / "bundle") as runtime:
        assert np.abs(runtime.logits(TOKENS) - expected).max() <= 0.02 * expected.std()


def test_gpu_products_do_not_round_activations(bundle: Path) -> None:
    for target, expected in (("cpu", {4}), ("gpu", {0})):
        nodes = onnx.load(bundle / f"all.{target}.onnx", load_external_data=False).graph.node
        levels = {attribute.i for node in nodes for attribute in node.attribute if attribute.name == "accuracy_level"}
        assert levels == expected


def test_live_variants_agree_on_both_targets(bundle: Path, tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    """Adapters are fp16 inputs. The reference is the cpu graph, which other tests compare with PEFT."""
    with gpu_runtime(bundle) as gpu, Runtime(bundle, threads=1, provider="cpu") as cpu:
        for variant, mix in (("plain-live", None), ("mixed", None), (None, {"plain": -0.5}), (None, {})):
            ours, theirs = (runtime.logits(TOKENS, variant=variant, mix=mix) for runtime in (gpu, cpu))
            assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.998
        bare, live = (gpu.logits(TOKENS, variant=name) for name in ("base", "plain-live"))
    assert np.abs(live - bare).max() > 0.5 * bare.std()


def test_the_cache_grows_and_is_reused(bundle: Path) -> None:
    """The second prompt outgrows the smallest cache, 256 positions, and starts with the first prompt."""
    prompt = random_tokens(40, seed=5)
    with gpu_runtime(bundle) as runtime:
        first = runtime.generate(prompt, max_tokens=100)
        second = runtime.generate(prompt + random_tokens(230, seed=6), max_tokens=100)
    assert second.reused_tokens == 40
    with gpu_runtime(bundle) as fresh:
        assert fresh.generate(prompt, max_tokens=100).tokens == first.tokens
    with gpu_runtime(bundle) as fresh:
        assert fresh.generate(prompt + random_tokens(230, seed=6), max_tokens=100).tokens == second.tokens


def test_pocket_writes_torchs_greedy_tokens(models_folder: Path, tmp_path: Path) -> None:
    """A merged fp16 variant of a trained model, compared with torch on the merged model."""
    from peft import PeftModel

    base = models_folder / "pocket"
    make_adapter(base, tmp_path / "adapter", size=0.02)
    recipe = Recipe(str(base), {"a": tmp_path / "adapter"}, {"v": VariantRecipe({"a": 1.0})}, Quantization(bits=32), targets=BOTH)
    export(recipe, tmp_path / "bundle", gate="off")
    merged = PeftModel.from_pretrained(load_base(base), str(tmp_path / "adapter")).merge_and_unload()
    with gpu_runtime(tmp_path / "bundle") as runtime:
        prompt = runtime.encode("Question: how does a library lend its books?\nAnswer:")
        expected = torch_logits(merged, prompt)
        ours = runtime.logits(prompt)
        written = list(runtime.generate(prompt, max_tokens=24).tokens)
    assert len(written) == 24
    assert written == greedy(merged, prompt, 24)
    assert np.abs(ours - expected).max() <= 0.01 * expected.std()


def test_residuals_that_leave_fp16s_range(tmp_path: Path) -> None:
    """Gemma's sums grow beyond 65504; the graph keeps them, and the norms on them, in float32."""
    config_class, settings = SHAPES["gemma2"]
    make(tmp_path / "base", config_class, settings)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights = {name: 30000 * weight if "post_" in name else weight for name, weight in weights.items()}
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    theirs = load_base(tmp_path / "base")
    with torch.no_grad():
        states = theirs(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
    assert states[-2].abs().max() > np.finfo(np.float16).max
    expected = torch_logits(theirs, TOKENS)
    export_both(tmp_path / "base", tmp_path / "bundle", bits=32)
    with gpu_runtime(tmp_path / "bundle") as runtime:
        assert np.abs(runtime.logits(TOKENS) - expected).max() <= 0.05 * expected.std()


def test_a_weight_that_fp16_cannot_hold_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = 70000.0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"final\.norm reaches 70000, which fp16 cannot hold; leave \"gpu\" out of targets"):
        export_both(base, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("targets", [(), ("gpu",), ("cpu", "cpu"), ("cpu", "npu")])
def test_impossible_targets(targets: tuple[str, ...], tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every bundle has cpu"):
        build_variants(
            Base.open(tiny_base),
            [Variant("base")],
            tmp_path / "bundle",
            quantization=Quantization(),
            adapters={},
            live_adapters={},
            targets=targets,
        )


def test_bases_without_a_native_graph_are_for_cpu_alone(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"targets = \['cpu', 'gpu'\]: a gpt2 is exported through Optimum, for cpu alone"):
        export(Recipe(str(tmp_path / "base"), {}, {"base": VariantRecipe({})}, targets=BOTH), tmp_path / "bundle")
