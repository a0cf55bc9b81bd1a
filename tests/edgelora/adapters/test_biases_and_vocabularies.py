"""Biases and vocabularies of adapters: what Adapter and Mix say of them, and what refuses them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgelora.adapters.checks import check_same_base
from edgelora.adapters.folder import CONFIG, Adapter, Provenance, write_provenance
from edgelora.composing.compose import compose
from edgelora.exporting.recipe import parse_recipe
from edgelora.exporting.trained_base import find_quantization
from edgelora.in_torch.mixed_model import MixedModel
from edgelora.mix.mix import Mix
from edgelora_export.base.base import Base
from edgelora_runtime.errors import InputError
from tests.inputs.adapters import merge_by_peft, train
from tests.tiny import load_base, make_base, make_tokenizer, random_tokens, torch_logits

if TYPE_CHECKING:
    from pathlib import Path

Q = "model.layers.0.self_attn.q_proj"
TOKENS = random_tokens(20, seed=4)
SETTINGS: dict[str, dict[str, Any]] = {
    "factor bias": {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    "all biases": {"bias": "all", "target_modules": ["q_proj"]},
    "plain": {"target_modules": ["q_proj"]},
    "tokens": {"trainable_token_indices": [2, 7], "target_modules": ["q_proj"]},
    "embedding": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    "both, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "target_modules": ["q_proj"]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("biases")
    make_base(folder / "base", attention_bias=True)
    make_base(folder / "tied", tie_word_embeddings=True)
    for name, settings in SETTINGS.items():
        train(folder / ("tied" if name in ("tokens", "embedding", "both, tied") else "base"), folder / name, **settings)
    for name, rows in (("more", 310), ("most", 320)):
        train(folder / "tied", folder / name, resize=rows, target_modules=["q_proj"])
    return folder


def opened(root: Path, *names: str) -> dict[str, Adapter]:
    return {name: Adapter.open(root / name, name) for name in names}


def test_what_adapters_say_of_biases_and_vocabulary(root: Path) -> None:
    said = {name: (bool(a.biased), a.vocab_size, a.ties_vocab) for name, a in opened(root, *SETTINGS, "more").items()}
    assert said == {
        "factor bias": (True, None, False),
        "all biases": (True, None, False),
        "plain": (False, None, False),
        "tokens": (False, None, True),
        "embedding": (False, 300, False),
        "both, tied": (False, 300, True),
        "more": (False, 310, True),
    }


def test_biases_of_a_mix_add_up(root: Path) -> None:
    base = Base.open(root / "base").tensor(f"{Q}.bias")
    theirs = {
        name: merge_by_peft(root / "base", root / name)[f"{Q}.bias"].numpy() - base for name in ("factor bias", "all biases")
    }
    mix = Mix(opened(root, "factor bias", "all biases"), {"factor bias": 0.5, "all biases": {"*layers.0*": -0.25}})
    assert {module for module in mix.biased if "layers.1" in module} == {
        f"model.layers.1.self_attn.{name}" for name in ("q_proj", "o_proj")
    }
    expected = 0.5 * theirs["factor bias"] - 0.25 * theirs["all biases"]
    np.testing.assert_allclose(mix.bias(Q, base), expected, atol=1e-6)


def test_biases_mix_by_sums_alone(root: Path) -> None:
    adapters = opened(root, "factor bias", "plain")
    with pytest.raises(InputError, match=r"factor bias adds to biases.*linear or svd instead of ties"):
        Mix(adapters, {"factor bias": 0.5, "plain": 0.5}, "ties")
    Mix(adapters, {"factor bias": 0.5}, "ties")


def test_vocabularies_of_two_sizes_do_not_mix(root: Path) -> None:
    with pytest.raises(InputError, match=r"310.*320|320.*310"):
        Mix(opened(root, "more", "most"), {"more": 0.5, "most": 0.5})
    assert Mix(opened(root, "more", "plain"), {"more": 0.5, "plain": 0.5}).vocab_size == 310


def test_a_head_trained_as_one_and_apart_do_not_mix(root: Path) -> None:
    with pytest.raises(InputError, match="tokens trained embedding and head as one, embedding apart"):
        Mix(opened(root, "tokens", "embedding"), {"tokens": 0.5, "embedding": 0.5})


@pytest.mark.parametrize("name", ["factor bias", "tokens", "embedding"])
def test_compose_refuses_what_factors_cannot_hold(root: Path, name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{name}: .*export it merged"):
        compose({name: (root / name, 1.0)}, tmp_path / "out")


@pytest.mark.parametrize("name", ["factor bias", "all biases", "tokens", "both, tied"])
def test_torch_sets_biases_and_tied_heads(root: Path, name: str) -> None:
    """A mix in torch gives the logits of PEFT's merged model, and leaves the base as it was."""
    base = root / ("base" if "bias" in name else "tied")
    model = MixedModel(load_base(base), make_tokenizer())
    bare = torch_logits(model.model, TOKENS)
    model.set_mix(Mix(opened(root, name), {name: 1.0}))
    ours = torch_logits(model.model, TOKENS)
    theirs = load_base(base)
    theirs.load_state_dict(merge_by_peft(base, root / name))
    assert np.abs(ours - torch_logits(theirs, TOKENS)).max() <= 1e-4
    assert np.abs(ours - bare).max() > 0.01
    model.set_mix(None)
    np.testing.assert_array_equal(torch_logits(model.model, TOKENS), bare)


def test_a_token_beyond_the_base_is_refused(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root / "tokens", tmp_path / "a")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"trainable_token_indices": [2, 300]}))
    with pytest.raises(InputError, match=r"names token 300, but model\.embed_tokens has 300 rows"):
        Adapter.open(folder).dense("model.embed_tokens", np.zeros((300, 64), np.float32))
    (folder / CONFIG).write_text(json.dumps(config | {"trainable_token_indices": [2, 3, 4]}))
    with pytest.raises(InputError, match="names 3 of them"):
        Adapter.open(folder)


def test_names_that_differ_by_a_wrapper_do_not_mix(root: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(root / "plain", tmp_path / "b")
    file = folder / "adapter_model.safetensors"
    save_file({key.replace("model.layers", "thinker.layers"): value for key, value in load_file(file).items()}, file)
    with pytest.raises(InputError, match=r"b names .*thinker\.layers.* what a names model\.layers"):
        check_same_base({"a": Adapter.open(root / "plain", "a"), "b": Adapter.open(folder, "b")})


# --- the base of training, stated in the recipe ---------------------------------------------------------------------------------


def test_a_recipe_states_the_base_of_training(tmp_path: Path) -> None:
    table = {"law": {"path": "law", "trained_on": "nf4"}, "sql": "sql"}
    recipe = parse_recipe({"base": "b", "adapters": table, "variants": {"v": {"mix": {"law": 1.0}}}}, tmp_path)
    assert recipe.adapters == {"law": tmp_path / "law", "sql": tmp_path / "sql"}
    assert recipe.trained_on == {"law": "nf4"}
    for wrong in ({"path": "law", "trained_on": "int8"}, {"trained_on": "nf4"}, {"path": "law", "rank": 4}, 5):
        with pytest.raises(InputError, match=r"adapters\.law"):
            parse_recipe({"base": "b", "adapters": {"law": wrong}, "variants": {"v": {}}}, tmp_path)


def test_what_is_stated_decides_the_trained_base(root: Path) -> None:
    stated = {name: Adapter.open(root / "plain", name, trained_on=name) for name in ("nf4", "int4", "none")}
    assert [find_quantization(Mix({"a": one}, {"a": 1.0})) for one in stated.values()] == ["nf4", "int4", None]
    assert find_quantization(Mix(stated, {"nf4": 0.5, "int4": 0.5})) is None
    assert find_quantization(Mix({"a": Adapter.open(root / "plain")}, {"a": 1.0})) is None


def test_a_statement_that_edgelora_json_contradicts_is_refused(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root / "plain", tmp_path / "a")
    write_provenance(folder, Provenance("tiny", "0" * 64, "int4", "", 0, "default", 0, 4, 8.0, 1, 1e-3))
    assert Adapter.open(folder, trained_on="int4").trained_on == "int4"
    with pytest.raises(InputError, match=r"trained_on = 'nf4', but its edgelora.json says 'int4'"):
        Adapter.open(folder, trained_on="nf4")
