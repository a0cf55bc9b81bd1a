"""compose writes an adapter that PEFT loads with the same ΔW."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from edgelora.adapters.folder import CONFIG, Adapter, Provenance, read_provenance, write_provenance
from edgelora.composing.compose import compose
from edgelora.mix.methods import MIX_METHODS
from edgelora.mix.mix import Mix
from edgelora_runtime.errors import InputError
from tests.tiny import load_base, make_adapter, make_base, random_tokens, torch_logits

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora.mix.weights import Weight

LINEAR = {"plain": 0.6, "attention": -0.4, "rslora": 0.3, "patterns": 1.1}


def peft_deltas(base: Path, folder: Path) -> dict[str, Any]:
    model = PeftModel.from_pretrained(load_base(base), str(folder))
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").numpy()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and "default" in layer.lora_A
    }


def test_a_linear_mix_is_exact_in_peft(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's ΔW of the mix is the weighted sum of PEFT's ΔW of each adapter."""
    steps: list[tuple[int, int, str]] = []
    report = compose(
        {name: (tiny_adapters[name], weight) for name, weight in LINEAR.items()},
        tmp_path / "mixed",
        on_progress=lambda *step: steps.append(step),
    )
    assert report.largest_error == 0
    assert steps[-1][0] == steps[-1][1] == report.modules
    parts = {name: peft_deltas(tiny_base, tiny_adapters[name]) for name in LINEAR}
    mixed = peft_deltas(tiny_base, tmp_path / "mixed")
    assert mixed.keys() == set().union(*parts.values())
    assert report.modules == len(mixed)
    for module, delta in mixed.items():
        expected = sum(weight * parts[name][module] for name, weight in LINEAR.items() if module in parts[name])
        np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-5)


def test_a_ties_mix_is_near_and_the_report_says_how_near(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    weights = {"plain": 0.7, "other": 0.5}
    report = compose(
        {name: (tiny_adapters[name], weight) for name, weight in weights.items()}, tmp_path / "m", method="ties", density=0.5
    )
    mix = Mix({name: Adapter.open(tiny_adapters[name]) for name in weights}, weights, "ties", 0.5)
    errors = [
        np.linalg.norm(delta - mix.dense(module)) / np.linalg.norm(mix.dense(module))
        for module, delta in peft_deltas(tiny_base, tmp_path / "m").items()
    ]
    assert max(errors) == pytest.approx(report.largest_error, rel=1e-3)
    assert report.rank == 6


@pytest.mark.parametrize("method", MIX_METHODS)
def test_peft_reads_what_every_method_makes(method: str, tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's ΔW is that of the mix, within the reported error, for weights by module as well."""
    weights: dict[str, Weight] = {"plain": {"*": 0.7, "*.mlp.*": 0.2}, "rslora": -0.4, "attention": 0.5}
    report = compose(
        {name: (tiny_adapters[name], weight) for name, weight in weights.items()},
        tmp_path / "m",
        method=method,
        density=0.5,
        seed=4,
    )
    mix = Mix({name: Adapter.open(tiny_adapters[name], name) for name in weights}, weights, method, 0.5, 4)
    found = peft_deltas(tiny_base, tmp_path / "m")
    assert found.keys() == mix.modules
    sizes = {module: np.linalg.norm(mix.dense(module)) for module in found}
    errors = [np.linalg.norm(delta - mix.dense(module)) / sizes[module] for module, delta in found.items()]
    assert max(errors) == pytest.approx(report.largest_error, abs=2e-6)
    assert np.mean(errors) == pytest.approx(report.mean_error, abs=2e-6)
    assert (report.largest_error == 0) == (MIX_METHODS[method].factored is not None)


@pytest.mark.parametrize("method", ["linear", "ties", "core_tsv"])
def test_a_rank_cuts_and_the_report_says_what_is_lost(method: str, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    weights = {"plain": 0.7, "other": 0.5}
    report = compose({n: (tiny_adapters[n], w) for n, w in weights.items()}, tmp_path / "m", method=method, rank=3)
    mix = Mix({name: Adapter.open(tiny_adapters[name], name) for name in weights}, weights, method)
    lost = []
    for module in mix.modules:
        singular = np.linalg.svd(mix.dense(module).astype(np.float64), compute_uv=False)
        lost.append(np.linalg.norm(singular[3:]) / np.linalg.norm(singular))
    assert report.rank == 3
    assert report.largest_error == pytest.approx(max(lost), rel=1e-4)
    assert report.mean_error == pytest.approx(np.mean(lost), rel=1e-4)


def test_weights_of_nothing_are_refused(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to compose"):
        compose({"plain": (tiny_adapters["plain"], 0.0)}, tmp_path / "m")


def test_the_mixed_adapter_runs_in_peft(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    compose({"plain": (tiny_adapters["plain"], 1.0)}, tmp_path / "same")
    tokens = random_tokens(20)
    one, other = (
        torch_logits(PeftModel.from_pretrained(load_base(tiny_base), str(folder)).eval(), tokens)
        for folder in (tiny_adapters["plain"], tmp_path / "same")
    )
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_mix_of_mixes(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    """compose reads its own output, and weights multiply."""
    compose({"a": (tiny_adapters["plain"], 0.5), "b": (tiny_adapters["patterns"], 2.0)}, tmp_path / "first")
    compose({"first": (tmp_path / "first", 0.5), "c": (tiny_adapters["attention"], 1.0)}, tmp_path / "second")
    direct = Mix(
        {name: Adapter.open(tiny_adapters[name]) for name in ("plain", "patterns", "attention")},
        {"plain": 0.25, "patterns": 1.0, "attention": 1.0},
    )
    found = Adapter.open(tmp_path / "second")
    for module in direct.modules:
        np.testing.assert_allclose(found.dense(module), direct.dense(module), rtol=1e-4, atol=1e-6)


def test_the_config_is_one_that_peft_reads(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    compose({"plain": (tiny_adapters["plain"], 1.0), "patterns": (tiny_adapters["patterns"], 1.0)}, tmp_path / "m")
    config = LoraConfig.from_pretrained(str(tmp_path / "m"))
    assert config.task_type == "CAUSAL_LM"
    assert config.base_model_name_or_path == json.loads((tiny_adapters["plain"] / CONFIG).read_bytes())["base_model_name_or_path"]


def test_an_old_output_is_replaced_and_anything_else_kept(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    compose({"a": (tiny_adapters["plain"], 1.0)}, tmp_path / "m")
    before = Adapter.open(tmp_path / "m").sha256
    compose({"a": (tiny_adapters["other"], 1.0)}, tmp_path / "m")
    assert Adapter.open(tmp_path / "m").sha256 != before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").touch()
    with pytest.raises(InputError, match="choose another --output"):
        compose({"a": (tiny_adapters["plain"], 1.0)}, tmp_path / "thesis")


def test_composing_in_place(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_adapters["plain"], tmp_path / "a")
    delta = Adapter.open(folder).dense("model.layers.0.self_attn.q_proj")
    compose({"a": (folder, 2.0)}, folder)
    np.testing.assert_allclose(Adapter.open(folder).dense("model.layers.0.self_attn.q_proj"), 2 * delta, rtol=1e-5)


def provenance(base: str) -> Provenance:
    return Provenance("base", base * 64, "nf4", "d" * 64, 100, "kaiming", 0, 4, 8.0, 10, 2e-4)


def test_provenance_of_the_common_base_is_kept(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    one, two = (shutil.copytree(tiny_adapters[name], tmp_path / name) for name in ("plain", "other"))
    compose({"one": (one, 1.0), "two": (two, 0.5)}, tmp_path / "unknown")
    assert read_provenance(tmp_path / "unknown") is None
    write_provenance(one, provenance("a"))
    compose({"one": (one, 1.0), "two": (two, 0.5)}, tmp_path / "half")
    assert read_provenance(tmp_path / "half") is None, "of two nothing is known"
    write_provenance(two, provenance("a"))
    compose({"one": (one, 1.0), "two": (two, 0.5)}, tmp_path / "known")
    found = read_provenance(tmp_path / "known")
    assert found is not None
    assert (found.base_sha256, found.base_quantization, found.rank) == ("a" * 64, "nf4", 6)
    assert found.init == "composed: linear(1 one + 0.5 two)"
    compose(
        {"one": (one, {"*.q_proj": 2}), "two": (two, 0.5)}, tmp_path / "known", method="dare_ties", density=0.3, seed=5, rank=2
    )
    found = read_provenance(tmp_path / "known")
    assert found is not None
    assert found.init == "composed: dare_ties({*.q_proj: 2} one + 0.5 two, density 0.3, seed 5), cut to rank 2"


def test_adapters_of_other_bases_are_refused_with_every_mismatch(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    one, two, three = (shutil.copytree(tiny_adapters[name], tmp_path / name) for name in ("plain", "other", "rslora"))
    for folder, base in ((one, "a"), (two, "b"), (three, "c")):
        write_provenance(folder, provenance(base))
    with pytest.raises(InputError) as caught:
        compose({"one": (one, 1.0), "two": (two, 1.0), "three": (three, 1.0)}, tmp_path / "m")
    assert "two was trained on" in str(caught.value)
    assert "three was trained on" in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_other_shapes_are_refused(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    make_base(tmp_path / "narrow", hidden_size=32)
    make_adapter(tmp_path / "narrow", tmp_path / "n")
    with pytest.raises(InputError, match=r"32x32 in n, 64x64 in plain"):
        compose({"plain": (tiny_adapters["plain"], 1.0), "n": (tmp_path / "n", 1.0)}, tmp_path / "m")


def test_nothing_to_compose_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one"):
        compose({}, tmp_path / "m")


def test_adapters_of_transposed_layers_mix_as_others_do(tmp_path: Path) -> None:
    """GPT-2 stores weights as (K, N), and PEFT sets fan_in_fan_out; ΔW (N, K) is still B·A."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make_model() -> Any:
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2))
        return model.eval()

    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        lora = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
        get_peft_model(make_model(), lora).save_pretrained(str(tmp_path / name))
    compose({"one": (tmp_path / "one", 0.6), "two": (tmp_path / "two", -0.4)}, tmp_path / "mixed")

    def deltas(folder: Path) -> dict[str, Any]:
        model = PeftModel.from_pretrained(make_model(), str(folder))
        layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
        return {name.removeprefix("base_model.model."): layer.get_delta_weight("default") for name, layer in layers.items()}

    one, two, mixed = (deltas(tmp_path / name) for name in ("one", "two", "mixed"))
    assert set(mixed) == {"transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"}
    adapter = Adapter.open(tmp_path / "one")
    for module, delta in mixed.items():
        assert torch.allclose(delta, 0.6 * one[module] - 0.4 * two[module], atol=1e-6)
        assert np.abs(adapter.dense(module) - one[module].detach().numpy().T).max() < 1e-6
