"""Merge-aware training: the exported variant runs what training computed, and gradients are those of the unrounded sum."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config

from edgelora.adapters.folder import read_provenance
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora.in_torch.merge_aware import check_merge_aware, hold_merged
from edgelora.in_torch.reference import load_adapted, load_merged
from edgelora.in_torch.train import train
from edgelora.in_torch.train_config import TrainConfig
from edgelora_export.base.base import Base
from edgelora_export.bundle.gate import Gate
from edgelora_export.plan.variants import Quantization
from edgelora_export.quantize.int4 import quantize_rtn
from edgelora_runtime import Runtime
from edgelora_runtime.errors import InputError
from tests.tiny import LINEARS, load_base, make_adapter, make_base, random_tokens, torch_logits

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ("cat", "day", "sun", "moon", "mat", "one")
LAYER = "model.layers.0.mlp.down_proj"
UNTIED, TIED_PADDED = "untied", "tied-padded"  # heads of 8 are padded to 16 in the graph, and with them o_proj's columns


def write_rows(path: Path) -> Path:
    rows = [{"prompt": f"the {word} {other}", "completion": f" and {other} {word}"} for word in WORDS for other in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=[UNTIED, TIED_PADDED])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A base and an adapter that was trained merge-aware on it."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = {"tie_word_embeddings": True, "head_dim": 8} if request.param == TIED_PADDED else {}
    make_base(folder / "base", **settings)
    rows = write_rows(folder / "rows.jsonl")
    config = TrainConfig(str(folder / "base"), rows, folder / "adapter", rank=4, lr=1e-2, max_steps=12, batch_size=4)
    train(replace(config, quant="int4", merge_aware=True))
    return request.param, folder / "base", folder / "adapter"


def make_recipe(base: Path, adapter: Path, **quantization: Any) -> Recipe:
    mixes = {"base": {}, "kept": {"a": 1.0}, "half": {"a": 0.5}}
    variants = {name: VariantRecipe(mix) for name, mix in mixes.items()}
    return Recipe(str(base), {"a": adapter}, variants, Quantization(**quantization), gate=Gate(retention=-1e6))


def test_exported_variant_computes_what_training_computed(trained: tuple[str, Path, Path], tmp_path: Path) -> None:
    kind, base, adapter = trained
    provenance = read_provenance(adapter)
    assert provenance is not None
    assert (provenance.base_quantization, provenance.merge_aware) == ("int4", True)
    manifest = export(make_recipe(base, adapter), tmp_path / "bundle")
    tokens = random_tokens(40)
    wanted = torch_logits(load_merged(Base.open(base), adapter), tokens)
    with Runtime(tmp_path / "bundle", kernels="onnxruntime") as runtime:
        kept, half = (runtime.logits(tokens, variant=name) for name in ("kept", "half"))
    spread = float(np.std(wanted))
    assert np.sqrt(np.square(kept - wanted).mean()) < 0.05 * spread  # activations of int8, which training does not round
    assert np.sqrt(np.square(half - wanted).mean()) > 0.1 * spread
    variant = manifest.variants["kept"]
    assert variant.own_vocab == (("embedding", "head") if kind == TIED_PADDED else ("head",))
    assert variant.calibration is None
    assert variant.fidelity is not None
    assert variant.fidelity.outcome == "passed"
    assert variant.fidelity.kl_mean < 2e-3
    assert max(product.noise for product in variant.fidelity.products.values()) < 1e-4  # the very codes
    other = manifest.variants["half"].fidelity
    assert other is not None
    assert max(product.noise for product in other.products.values()) > 1e-2


def test_reference_in_torch_is_merged(trained: tuple[str, Path, Path]) -> None:
    """Whatever base the caller names, a merge-aware adapter runs as it was trained."""
    _, base, adapter = trained
    tokens = random_tokens(20)
    found, wanted = (
        torch_logits(model, tokens)
        for model in (load_adapted(Base.open(base), adapter, "nf4"), load_merged(Base.open(base), adapter))
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.fixture
def held(tiny_base: Path, tmp_path: Path) -> Any:
    """A random adapter, and PEFT's model of it with a merge-aware forward pass."""
    make_adapter(tiny_base, tmp_path / "adapter")
    return load_merged(Base.open(tiny_base), tmp_path / "adapter", trainable=True)


def test_forward_pass_is_that_of_the_rounded_merged_model(held: Any, tiny_base: Path, tmp_path: Path) -> None:
    """PEFT merges, and export's quantizer rounds every linear layer, the embedding and the head."""
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(load_base(tiny_base), tmp_path / "adapter")
    for model in (adapted, held):
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # so that fp16 holds the factors
                parameter.data = parameter.data.half().float()
    merged = adapted.merge_and_unload()
    for module in merged.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.data = torch.from_numpy(quantize_rtn(module.weight.data.numpy()).dequantize())
    tokens = random_tokens(30)
    found, wanted = torch_logits(held, tokens), torch_logits(merged, tokens)
    assert np.abs(found - wanted).max() < 0.02 * np.std(wanted)  # PEFT adds in another order, which may move a code


def test_gradients_are_those_of_the_unrounded_sum(held: Any) -> None:
    layer = held.get_submodule(f"base_model.model.{LAYER}")
    a, b = (factors["default"].weight for factors in (layer.lora_A, layer.lora_B))
    for factor in (a, b):  # so that fp16 holds them
        factor.data = factor.data.half().float()
    x: Any = torch.randn(7, a.shape[1], requires_grad=True)
    seen = torch.randn(7, b.shape[0])
    y = layer(x)
    y.backward(seen)
    scale = layer.scaling["default"]
    weight = quantize_rtn((layer.base_layer.weight + scale * b @ a).detach().numpy()).dequantize()
    x64, a64, b64, seen64, weight64 = (value.double().detach() for value in (x, a, b, seen, torch.from_numpy(weight)))
    torch.testing.assert_close(y.double(), x64 @ weight64.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), seen64 @ weight64, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b.grad.double(), scale * seen64.T @ (x64 @ a64.T), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a.grad.double(), scale * (seen64 @ b64).T @ x64, atol=1e-5, rtol=1e-5)


def test_weight_follows_its_factors(held: Any, tiny_base: Path) -> None:
    tokens = random_tokens(10)
    before = torch_logits(held, tokens)
    with torch.no_grad():
        held.get_submodule(f"base_model.model.{LAYER}").lora_B["default"].weight.mul_(3)
    assert np.abs(torch_logits(held, tokens) - before).max() > 1e-2
    with held.disable_adapter():
        bare = torch_logits(held, tokens)
    rounded = load_base(tiny_base)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.data = torch.from_numpy(quantize_rtn(module.weight.data.numpy()).dequantize())
    np.testing.assert_allclose(bare, torch_logits(rounded, tokens), atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_weight_follows_an_optimizer(held: Any, fused: bool) -> None:
    """The trainer's default is the fused one, which leaves torch's version counters as they are."""
    factors = [parameter for parameter in held.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=0.02, fused=fused)
    ids = torch.tensor([random_tokens(24)])
    losses = []
    for _ in range(12):
        loss = held(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3, losses


@pytest.mark.filterwarnings("ignore:.lora_bias=True")
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "plain LoRA"),
        ({"lora_bias": True}, "plain LoRA"),
        ({"lora_dropout": 0.1}, "no dropout"),
        ({"target_modules": ["lm_head"]}, "lm_head is no linear layer"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is no linear layer"),
    ],
)
def test_other_adapters_are_refused(tiny_base: Path, settings: dict[str, Any], named: str) -> None:
    base = Base.open(tiny_base)
    lora = LoraConfig(**{"r": 4, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM", **settings})
    with pytest.raises(InputError, match=named):
        hold_merged(get_peft_model(load_base(tiny_base), lora), base.config)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant": "nf4"}, "quant = nf4; use quant = int4"),
        ({"quant": "int4", "dropout": 0.1}, "dropout = 0.1 does not go with merge_aware"),
        ({"quant": "int4", "start": "pissa"}, "start = pissa changes the base"),
        ({"quant": "int4", "dora": True}, "dora does not go with merge_aware"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        TrainConfig("base", tmp_path / "rows", tmp_path / "adapter", merge_aware=True, **settings)


def test_base_without_a_native_graph_is_refused(tmp_path: Path) -> None:
    make_base(tmp_path / "gpt2", config_class=GPT2Config, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(InputError, match="exported through Optimum"):
        check_merge_aware(Base.open(tmp_path / "gpt2"))
