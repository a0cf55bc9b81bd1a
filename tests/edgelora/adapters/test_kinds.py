"""Every kind of LoRA adapter gives PEFT's merged weights, and a bundle of them gives PEFT's logits."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from edgelora.adapters.folder import Adapter, Provenance, write_provenance
from edgelora.composing.compose import compose
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora.mix.methods import MIX_METHODS
from edgelora.mix.mix import Mix
from edgelora_export.base.base import Base
from edgelora_export.plan.variants import Quantization
from edgelora_runtime import Runtime
from edgelora_runtime.errors import InputError
from tests.tiny import ATTENTION, LINEARS, load_base, make_base, random_tokens, torch_logits

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = random_tokens(30, seed=3)
EVERYTHING = [*LINEARS, "embed_tokens", "lm_head"]
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora", "alpha_pattern": {"k_proj": 3}},
    "dora pissa": {"use_dora": True, "init_lora_weights": "pissa"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["v_proj", "embed_tokens"]},
    "everything rslora": {"target_modules": EVERYTHING, "use_rslora": True},
    "saved head": {"target_modules": list(ATTENTION), "modules_to_save": ["lm_head"]},
    "saved ends and layer": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "embed_tokens", "layers.1.mlp.up_proj"],
    },
    "transposed": {"fan_in_fan_out": True},
}
FROM_BASE = ("dora", "pissa", "olora", "saved head")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


def train_somewhat(base: Path, folder: Path, **settings: Any) -> Path:
    """Saves an adapter whose trained values all differ from their initialization."""
    torch.manual_seed(8)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(load_base(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {name: train_somewhat(tiny_base, root / name, **kind) for name, kind in KINDS.items()}


def merged_by_peft(base: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(load_base(base), str(folder)).merge_and_unload().eval()


@pytest.mark.parametrize("name", KINDS)
def test_merged_weights_are_pefts(name: str, tiny_base: Path, folders: dict[str, Path]) -> None:
    base, adapter = Base.open(tiny_base), Adapter.open(folders[name])
    theirs = {key: value.numpy() for key, value in merged_by_peft(tiny_base, folders[name]).state_dict().items()}
    for key, expected in theirs.items():
        weight, module = base.tensor(key), key.removesuffix(".weight")
        if module in adapter.modules:
            assert np.abs(expected - weight).max() > 1e-3, "the adapter should matter"
            weight = weight + adapter.dense(module, weight)
        assert np.abs(weight - expected).max() <= 1e-5, module


def test_exported_variants_are_pefts_merged_models(tiny_base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    names = {name: f"a{index}" for index, name in enumerate(folders)}
    adapters = {names[name]: folder for name, folder in folders.items()}
    variants = {"base": VariantRecipe({}), **{name: VariantRecipe({name: 1.0}) for name in adapters}}
    export(Recipe(str(tiny_base), adapters, variants, Quantization(bits=32)), tmp_path / "bundle")
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        bare = runtime.logits(TOKENS, variant="base")
        assert np.abs(bare - torch_logits(load_base(tiny_base), TOKENS)).max() <= 2e-3
        for name, folder in folders.items():
            ours = runtime.logits(TOKENS, variant=names[name])
            assert np.abs(ours - torch_logits(merged_by_peft(tiny_base, folder), TOKENS)).max() <= 2e-3, name
            assert np.abs(ours - bare).max() > 0.1, name


def test_weights_of_a_mix_multiply_the_whole_change(tiny_base: Path, folders: dict[str, Path]) -> None:
    module = "model.layers.0.self_attn.q_proj"
    weight = Base.open(tiny_base).tensor(f"{module}.weight")
    adapters = {name: Adapter.open(folders[name], name) for name in ("dora", "pissa")}
    ours = Mix(adapters, {"dora": 0.6, "pissa": -0.3}).dense(module, weight)
    changes = {
        name: merged_by_peft(tiny_base, folders[name]).get_submodule(module).weight.detach().numpy() - weight for name in adapters
    }
    assert np.abs(ours - (0.6 * changes["dora"] - 0.3 * changes["pissa"])).max() <= 1e-5


@pytest.mark.parametrize("name", [*FROM_BASE, "head", "embedding"])
def test_live_variants_are_refused_with_the_reason(
    name: str, tiny_base: Path, folders: dict[str, Path], tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapters = {"a": folders[name], "plain": tiny_adapters["plain"]}
    recipe = Recipe(str(tiny_base), adapters, {"alive": VariantRecipe({"a": 1.0}, kind="live")}, Quantization(bits=32))
    with pytest.raises(InputError, match=r"alive cannot be live \(a: .*kind = 'merged'"):
        export(recipe, tmp_path / "bundle")
    variants = {"alive": VariantRecipe({"plain": 1.0}, kind="live"), "merged": VariantRecipe({"a": 1.0})}
    export(Recipe(str(tiny_base), adapters, variants, Quantization(bits=32)), tmp_path / "bundle")


@pytest.mark.parametrize("method", MIX_METHODS)
def test_methods_on_factors_refuse_adapters_without_factors(method: str, tiny_base: Path, folders: dict[str, Path]) -> None:
    """The other methods merge the whole change; linear and svd take factors or whole changes."""
    module = "model.layers.0.self_attn.q_proj"
    weight = Base.open(tiny_base).tensor(f"{module}.weight")
    adapters = {name: Adapter.open(folders[name], name) for name in ("dora", "pissa")}
    mix = Mix(adapters, {"dora": 1.0, "pissa": 1e-9}, method, 1.0)
    if MIX_METHODS[method].dense is None:
        with pytest.raises(InputError, match=rf"{module}: {method} works on factors, but dora is DoRA.*use one of linear"):
            mix.dense(module, weight)
    else:
        found = mix.dense(module, weight)
        assert found.dtype == np.float32 and found.shape == weight.shape
        if method in ("linear", "svd", "magnitude", "dare_linear"):
            np.testing.assert_allclose(found, adapters["dora"].dense(module, weight), atol=1e-6)


@pytest.mark.parametrize("method", ["linear", "ties", "core_ties"])
@pytest.mark.parametrize("name", [*FROM_BASE, "embedding"])
def test_compose_refuses_what_it_cannot_write(name: str, method: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="export"):
        compose({"a": (folders[name], 1.0)}, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("held", "refused"), [("nf4", True), ("int4", True), ("none", False)])
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_factors_out_of_rounded_weights_are_refused(
    name: str, held: str, refused: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "a")
    write_provenance(folder, Provenance("tiny", "0" * 64, held, "", 0, name, 0, 4, 8.0, 1, 1e-3))
    if not refused:
        assert Adapter.open(folder).modules
        return
    with pytest.raises(InputError, match=f"init_lora_weights is '{name}' on a base held as {held}.*plain LoRA"):
        Adapter.open(folder)


def test_a_change_of_one_of_two_tied_matrices_unties_the_variant(tmp_path: Path) -> None:
    make_base(tmp_path / "base", tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie"):
        folder = train_somewhat(tmp_path / "base", tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    recipe = Recipe(str(tmp_path / "base"), {"a": folder}, {"v": VariantRecipe({"a": 1.0})}, quantization=Quantization(bits=32))
    manifest = export(recipe, tmp_path / "bundle")
    assert manifest.variants["v"].own_vocab == ("embedding",)
    with pytest.warns(UserWarning, match="tie"):
        model = PeftModel.from_pretrained(load_base(tmp_path / "base"), str(folder)).eval()
    with Runtime(tmp_path / "bundle") as runtime:
        np.testing.assert_allclose(runtime.logits(TOKENS), torch_logits(model, TOKENS), atol=1e-4)


def test_a_saved_head_of_another_vocabulary_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    make_base(tmp_path / "base", vocab_size=320)
    folder = train_somewhat(tmp_path / "base", tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(InputError, match="lm_head is 320x64 in a, 300x64 in the base"):
        export(Recipe(str(tiny_base), {"a": folder}, {"v": VariantRecipe({"a": 1.0})}), tmp_path / "bundle")


def test_modules_to_save_without_their_weights_are_refused(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_adapters["plain"], tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    with pytest.raises(InputError, match="modules_to_save names lm_head"):
        Adapter.open(folder)
