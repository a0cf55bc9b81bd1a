"""Adapters mean the same as in PEFT; unsupported ones are refused with every reason."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from edgelora.adapters.checks import check_same_base
from edgelora.adapters.folder import (
    CONFIG,
    PROVENANCE,
    WEIGHTS,
    Adapter,
    Provenance,
    open_adapters,
    read_provenance,
    write_provenance,
)
from edgelora.composing.compose import compose
from edgelora_runtime.errors import InputError
from tests.tiny import load_base, make_adapter, make_base

if TYPE_CHECKING:
    from pathlib import Path

Q = "model.layers.0.self_attn.q_proj"

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha as a fraction": {"lora_alpha": 2.5},
    "rank pattern": {"rank_pattern": {"q_proj": 2, "v_proj": 7}},
    "alpha pattern": {"alpha_pattern": {"q_proj": 3, "up_proj": 11}},
    "patterns by full name": {"rank_pattern": {Q: 1}, "alpha_pattern": {Q: 5}},
    "patterns by part of the name": {"alpha_pattern": {"0.self_attn.q_proj": 5, "layers.1.mlp.up_proj": 6}},
    "patterns as expressions": {"alpha_pattern": {r"layers\.1\..*": 5, "[kv]_proj": 7}},
    "the first pattern counts": {"alpha_pattern": {"q_proj": 3, Q: 9}},
    "a pattern matches a whole ending": {"alpha_pattern": {"proj": 99, "_proj": 98, "o_proj": 4}},
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "one layer": {"layers_to_transform": [1]},
    "targets as an expression": {"target_modules": r".*layers\.0\.mlp\.(up|down)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_scale_and_delta_are_pefts(settings: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    make_adapter(tiny_base, tmp_path / "a", **settings)
    adapter = Adapter.open(tmp_path / "a")
    model = PeftModel.from_pretrained(load_base(tiny_base), str(tmp_path / "a"))
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and "default" in layer.lora_A
    }
    assert set(adapter.modules) == layers.keys()
    for module, layer in layers.items():
        assert adapter.scale(module) == pytest.approx(layer.scaling["default"], rel=1e-6)
        np.testing.assert_allclose(adapter.dense(module), layer.get_delta_weight("default").numpy(), rtol=1e-4, atol=1e-6)
        a, b = adapter.factors(module)
        np.testing.assert_allclose(b @ a, adapter.dense(module), rtol=1e-5, atol=1e-7)
        assert a.dtype == np.float32
        assert b.dtype == np.float32
        assert adapter.shapes[module] == (len(b), a.shape[1], len(a))
    assert adapter.rank == max(layer.r["default"] for layer in layers.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors(tiny_base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    make_adapter(tiny_base, tmp_path / "a")
    tensors = {name: tensor.to(dtype) for name, tensor in load_torch(tmp_path / "a" / WEIGHTS).items()}
    save_torch(tensors, tmp_path / "a" / WEIGHTS)
    a, b = Adapter.open(tmp_path / "a").factors(Q)
    np.testing.assert_array_equal(a, tensors[f"base_model.model.{Q}.lora_A.weight"].float().numpy())
    np.testing.assert_array_equal(b, 2 * tensors[f"base_model.model.{Q}.lora_B.weight"].float().numpy())


def copy(tiny_adapters: dict[str, Path], tmp_path: Path, **config: Any) -> Path:
    folder = shutil.copytree(tiny_adapters["plain"], tmp_path / "copy")
    value = json.loads((folder / CONFIG).read_bytes()) | config
    (folder / CONFIG).write_text(json.dumps(value))
    return folder


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "whole layers": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "layers as a number": ({"modules_to_save": 1.5}, "modules_to_save is 1.5"),
    "layers of numbers": ({"modules_to_save": [1]}, "modules_to_save is [1]"),
    "biases": ({"bias": "some"}, "bias is 'some'"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "another rank": ({"r": 5}, "rank"),
    "another rank by pattern": ({"rank_pattern": {"k_proj": 5}}, "k_proj 5"),
    "no rank": ({"r": 0}, "r is 0"),
    "rank as text": ({"r": "4"}, "r is '4'"),
    "nothing targeted": ({"target_modules": []}, "target_modules is empty"),
    "patterns as a list": ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
    "a pattern of text": ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern"),
    "pissa iterated": ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
    "corda": ({"init_lora_weights": "corda"}, "corda"),
    "loftq": ({"init_lora_weights": "loftq"}, "loftq"),
    "lora-ga": ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    "activated lora": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    "parameters": ({"target_parameters": ["mlp.experts.up"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "pooled inputs": ({"use_qalora": True}, "use_qalora"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
    "loha": ({"peft_type": "LOHA"}, "LOHA"),
    "no type": ({"peft_type": None}, "peft_type"),
    "alpha as text": ({"lora_alpha": "8"}, "lora_alpha"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
}


@pytest.mark.parametrize(("config", "mention"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unsupported_kinds_are_refused(
    config: dict[str, Any], mention: str, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        Adapter.open(copy(tiny_adapters, tmp_path, **config), "sql")
    assert mention in str(caught.value)
    assert "adapter sql" in str(caught.value)


def test_all_reasons_are_given_at_once(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    config = {"use_qalora": True, "bias": "some", "init_lora_weights": "pissa_niter_4"}
    with pytest.raises(InputError) as caught:
        Adapter.open(copy(tiny_adapters, tmp_path, **config))
    for mention in ("use_qalora", "bias is", "pissa_niter_4"):
        assert mention in str(caught.value)


@pytest.mark.parametrize("value", [None, False, "gaussian", "orthogonal", "eva", True])
def test_inits_that_leave_the_base_alone_are_read(value: Any, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    assert Adapter.open(copy(tiny_adapters, tmp_path, init_lora_weights=value)).modules


def change_weights(folder: Path, **tensors: Any) -> None:
    weights = load_file(folder / WEIGHTS)
    for key, tensor in tensors.items():
        if tensor is None:
            del weights[key]
        else:
            weights[key] = tensor
    save_file(weights, folder / WEIGHTS)


def key(factor: str, module: str = Q) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no A": ({key("A"): None}, "q_proj"),
    "no B": ({key("B"): None}, "q_proj"),
    "ranks differ": ({key("A"): np.zeros((3, 64), np.float32)}, "should be"),
    "a vector": ({key("A"): np.zeros(64, np.float32)}, "should be"),
    "an embedding": ({"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((4, 300), np.float32)}, "embed_tokens"),
    "a bias": ({f"base_model.model.{Q}.lora_B.bias": np.zeros(64, np.float32)}, "bias"),
    "a dora magnitude": ({f"base_model.model.{Q}.lora_magnitude_vector": np.zeros(64, np.float32)}, "magnitude"),
    "a norm": ({"base_model.model.model.norm.weight": np.zeros(64, np.float32)}, "norm"),
}


@pytest.mark.parametrize(("tensors", "mention"), BROKEN.values(), ids=BROKEN.keys())
def test_tensors_that_are_no_factors_are_refused(
    tensors: dict[str, Any], mention: str, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy(tiny_adapters, tmp_path)
    change_weights(folder, **tensors)
    with pytest.raises(InputError, match=mention):
        Adapter.open(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_factors_that_diverged_are_refused(factor: str, value: float, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(tiny_adapters, tmp_path)
    tensor = load_file(folder / WEIGHTS)[key(factor)]
    tensor[0, 0] = value
    change_weights(folder, **{key(factor): tensor})
    with pytest.raises(InputError, match="NaN or infinity"):
        Adapter.open(folder).factors(Q)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("raw", [None, b"", b"\xff\xff", b"[]", b"null"])
def test_unreadable_files_are_refused(name: str, raw: bytes | None, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(tiny_adapters, tmp_path)
    (folder / name).unlink()
    if raw is not None:
        (folder / name).write_bytes(raw)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        Adapter.open(folder)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        Adapter.open(tmp_path / "nothing", "sql")


def test_an_adapter_without_factors_is_refused(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(tiny_adapters, tmp_path)
    save_file({}, folder / WEIGHTS)
    with pytest.raises(InputError, match="no LoRA factors"):
        Adapter.open(folder)


def test_identity_follows_the_bytes(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    same = shutil.copytree(tiny_adapters["plain"], tmp_path / "same")
    assert Adapter.open(same).sha256 == Adapter.open(tiny_adapters["plain"]).sha256
    assert Adapter.open(tiny_adapters["other"]).sha256 != Adapter.open(tiny_adapters["plain"]).sha256
    assert Adapter.open(copy(tiny_adapters, tmp_path, lora_alpha=9)).sha256 != Adapter.open(same).sha256


# --- provenance -----------------------------------------------------------------------------------------------------------


def provenance(base: str = "a" * 64) -> Provenance:
    return Provenance("base", base, "nf4", "d" * 64, 100, "kaiming", 0, 4, 8.0, 10, 2e-4)


def test_provenance_round_trip(tmp_path: Path) -> None:
    assert read_provenance(tmp_path) is None
    write_provenance(tmp_path, provenance())
    assert read_provenance(tmp_path) == provenance()


@pytest.mark.parametrize("raw", [b"{}", b"[]", b"", b'{"base_name": "x"}'])
def test_broken_provenance_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / PROVENANCE).write_bytes(raw)
    with pytest.raises(InputError, match="edgelora"):
        read_provenance(tmp_path)


def with_provenance(folder: Path, target: Path, base: str) -> Adapter:
    shutil.copytree(folder, target)
    write_provenance(target, provenance(base))
    return Adapter.open(target, target.name)


def test_every_adapter_of_another_base_is_named(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    one, two, three, four = (
        with_provenance(tiny_adapters["plain"], tmp_path / name, base * 64)
        for name, base in (("one", "a"), ("two", "b"), ("three", "a"), ("four", "c"))
    )
    adapters = {adapter.name: adapter for adapter in (one, two, three, four)}
    with pytest.raises(InputError) as caught:
        check_same_base(adapters)
    assert "two was trained on" in str(caught.value)
    assert "four was trained on" in str(caught.value)
    assert "three was" not in str(caught.value)
    check_same_base({"one": one, "three": three})
    check_same_base({"one": one, "three": three}, "a" * 64)
    with pytest.raises(InputError, match=r"one was trained on.*three was trained on.*this base is bbbb"):
        check_same_base({"one": one, "three": three}, "b" * 64)


def test_without_provenance_the_shapes_speak(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    make_base(tmp_path / "wide", hidden_size=32)
    make_adapter(tmp_path / "wide", tmp_path / "other", target_modules=["q_proj", "up_proj"])
    adapters = {"plain": Adapter.open(tiny_adapters["plain"], "plain"), "other": Adapter.open(tmp_path / "other", "other")}
    with pytest.raises(InputError) as caught:
        check_same_base(adapters)
    for module in (Q, "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        assert module in str(caught.value)
    assert "32x32 in other, 64x64 in plain" in str(caught.value)
    check_same_base({"plain": adapters["plain"]})
    check_same_base({})


def test_export_refuses_adapters_of_another_base(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    from edgelora.exporting.export import export
    from edgelora.exporting.recipe import Recipe, VariantRecipe
    from edgelora_export.base.base import Base

    right = with_provenance(tiny_adapters["plain"], tmp_path / "right", Base.open(tiny_base).sha256)
    wrong = with_provenance(tiny_adapters["plain"], tmp_path / "wrong", "b" * 64)
    variants = {"v": VariantRecipe({"right": 1.0})}
    with pytest.raises(InputError, match="wrong was trained on"):
        export(Recipe(str(tiny_base), {"right": right.folder, "wrong": wrong.folder}, variants), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    export(Recipe(str(tiny_base), {"right": right.folder}, variants), tmp_path / "bundle")


def test_export_refuses_adapters_of_another_shape(tiny_base: Path, tmp_path: Path) -> None:
    from edgelora.exporting.export import export
    from edgelora.exporting.recipe import Recipe, VariantRecipe

    make_base(tmp_path / "narrow", hidden_size=32)
    make_adapter(tmp_path / "narrow", tmp_path / "other", target_modules=["q_proj"])
    make_base(tmp_path / "deep", num_hidden_layers=3)
    make_adapter(tmp_path / "deep", tmp_path / "third", target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj is 32x32 in other, 64x64 in the base.*layers\.1"):
        export(Recipe(str(tiny_base), {"other": tmp_path / "other"}, {"v": VariantRecipe({"other": 1.0})}), tmp_path / "bundle")
    with pytest.raises(InputError, match=r"layers\.2\.self_attn\.q_proj"):
        export(Recipe(str(tiny_base), {"third": tmp_path / "third"}, {"v": VariantRecipe({"third": 1.0})}), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


# --- what a config names and a file lacks ------------------------------------------------------------------------------------


def test_targets_without_factors_are_noted(tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(tiny_adapters, tmp_path, target_modules=["q_proj", "w_proj"], layers_to_transform=[0, 1, 5])
    said: list[str] = []
    open_adapters({"sql": folder, "plain": tiny_adapters["plain"]}, on_note=said.append)
    report = compose({"sql": (folder, 1.0)}, tmp_path / "out", on_note=said.append)
    expected = [
        "adapter sql: target_modules names w_proj, which has no factors",
        "adapter sql: layers_to_transform names 5, where nothing has factors",
    ]
    assert said == expected * 2
    assert list(report.notes) == expected
    assert Adapter.open(tmp_path / "out").notes == ()


def test_modules_that_the_base_lacks_are_counted(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    """Every way to use an adapter refuses one whose modules the base does not have, in part or at all."""
    from edgelora.composing.merge_into_base import merge_into
    from edgelora.exporting.export import export
    from edgelora.exporting.recipe import Recipe, VariantRecipe
    from edgelora.report.composition_report import report_composition

    folder = copy(tiny_adapters, tmp_path)
    tensors = {name.replace("layers.1.", "layers.9."): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    line = r"adapter part: 7 of its 14 modules are not in this llama base: model\.layers\.9\."
    adapters = {"part": folder, "plain": tiny_adapters["plain"]}
    with pytest.raises(InputError, match=line):
        compose({"part": (folder, 1.0)}, tmp_path / "out", base=str(tiny_base))
    with pytest.raises(InputError, match=line):
        merge_into(str(tiny_base), {"part": (folder, 1.0)}, tmp_path / "out")
    with pytest.raises(InputError, match=line):
        report_composition(adapters, base=str(tiny_base))
    # The bundle's one variant is live and of the other adapter; the adapter that does not fit would go along as factors.
    recipe = Recipe(str(tiny_base), adapters, {"v": VariantRecipe({"plain": 1.0}, kind="live")})
    with pytest.raises(InputError, match=line):
        export(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
