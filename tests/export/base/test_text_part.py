"""The text part of a multimodal model is the model that the wrapper runs on text, in torch and in a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from edgelora.composing.merge_into_base import merge_into
from edgelora.in_torch.train import load_base as load_training_base
from edgelora_export.base.base import Base
from edgelora_export.base.text_part import WRAPPERS as TAKEN
from edgelora_export.base.text_part import take_text_config
from edgelora_export.weights.torch_model import load_model
from edgelora_runtime import Runtime
from edgelora_runtime.errors import InputError
from tests.multimodal import WRAPPERS, make_wrapper
from tests.tiny import export_base, load_base, make_adapter, make_tokenizer, random_tokens, torch_logits

TOKENS = random_tokens(40)


def test_every_wrapper_that_is_taken_is_tried() -> None:
    assert {name.split()[0] for name in WRAPPERS} == set(TAKEN)


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_text_part_gives_the_wrappers_logits(name: str, tmp_path: Path) -> None:
    expected = torch_logits(make_wrapper(tmp_path / "base", name), TOKENS)
    assert expected.std() > 0.1
    base = Base.open(tmp_path / "base")
    assert all(tensor.startswith("model.") or tensor == "lm_head.weight" for tensor in base.tensors.files)
    np.testing.assert_array_equal(torch_logits(load_model(base), TOKENS), expected)
    export_base(tmp_path / "base", tmp_path / "bundle")
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        np.testing.assert_allclose(runtime.logits(TOKENS), expected, atol=2e-5)


def rename(folder: Path, renames: dict[str, str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for old, new in renames.items():
        tensors = {name.replace(old, new, 1) if name.startswith(old) else name: tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# How other versions of transformers name the same tensors.
NAMES: dict[str, tuple[str, dict[str, str]]] = {
    "as in memory": ("llava", {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}),
    "before wrappers had a model": ("qwen2_vl", {"model.language_model.": "model."}),
    "a model inside of a model": ("qwen3_vl", {"model.language_model.": "language_model.model."}),
}


@pytest.mark.parametrize(("name", "renames"), NAMES.values(), ids=NAMES.keys())
def test_tensors_are_found_under_each_of_their_names(name: str, renames: dict[str, str], tmp_path: Path) -> None:
    make_wrapper(tmp_path / "base", name)
    before = Base.open(tmp_path / "base").sha256
    rename(tmp_path / "base", renames)
    assert not any(file.startswith(old) for old in renames for file in load_file(tmp_path / "base" / "model.safetensors"))
    assert Base.open(tmp_path / "base").sha256 == before


def test_training_holds_the_text_part_in_nf4_as_it_holds_the_plain_model(tmp_path: Path) -> None:
    make_wrapper(tmp_path / "base", "gemma3", torch.bfloat16)
    base = Base.open(tmp_path / "base")
    load_model(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    make_tokenizer().save_pretrained(tmp_path / "plain")
    plain = Base.open(tmp_path / "plain")
    assert plain.sha256 == base.sha256
    (ours, _), (theirs, _) = (load_training_base(each, "nf4") for each in (base, plain))
    assert type(ours.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    np.testing.assert_array_equal(torch_logits(ours, TOKENS), torch_logits(theirs, TOKENS))
    assert ours.name_or_path == str(tmp_path / "base")


def test_a_merge_writes_the_text_part_as_a_plain_model(tmp_path: Path) -> None:
    make_wrapper(tmp_path / "base", "qwen3_vl")
    load_model(Base.open(tmp_path / "base")).save_pretrained(tmp_path / "plain")
    make_adapter(tmp_path / "plain", tmp_path / "adapter")
    expected: Any = PeftModel.from_pretrained(load_base(tmp_path / "plain"), str(tmp_path / "adapter")).merge_and_unload()
    merge_into(str(tmp_path / "base"), {"a": (tmp_path / "adapter", 1.0)}, tmp_path / "merged")
    merged = load_base(tmp_path / "merged")
    assert type(merged).__name__ == "Qwen3ForCausalLM"
    np.testing.assert_allclose(torch_logits(merged, TOKENS), torch_logits(expected, TOKENS), atol=1e-5)


def test_a_text_config_takes_over_what_the_wrapper_says() -> None:
    text = {"hidden_size": 64, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}, "eos_token_id": 5}
    shared = {"eos_token_id": [1, 106], "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "awq"}}
    found = take_text_config({"model_type": "qwen2_5_vl", "text_config": text, **shared}, Path("base"))
    assert found == {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 64,
        "rope_scaling": {"type": "default"},
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "max_window_layers": 80,
        "num_key_value_heads": 8,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        **shared,
    }


def test_qwen2_vls_flat_config_is_read(tmp_path: Path) -> None:
    expected = torch_logits(make_wrapper(tmp_path / "base", "qwen2_vl"), TOKENS)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    text = {key: value for key, value in config.pop("text_config").items() if key not in ("model_type", "rope_parameters")}
    path.write_text(json.dumps({**text, **config, "rope_theta": 1e4, "rope_scaling": {"type": "mrope"}}), encoding="utf-8")
    np.testing.assert_array_equal(torch_logits(load_model(Base.open(tmp_path / "base")), TOKENS), expected)


@pytest.mark.parametrize(("text", "tied"), [({}, False), ({"tie_word_embeddings": True}, True)])
def test_a_tie_that_only_the_text_config_names_holds(text: dict[str, Any], tied: bool) -> None:
    found = take_text_config({"model_type": "llava", "text_config": text}, Path("base"))
    assert found["tie_word_embeddings"] is tied


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no text_config": ({"text_config": None}, "has no text_config"),
    "a classifier": ({"architectures": ["LlavaForSequenceClassification"]}, "is a classifier"),
    "a bare wrapper": ({"architectures": ["LlavaModel"]}, "without a language head"),
    "an unknown text part": ({"text_config": {"model_type": "abacus"}}, r"\(its text part\): model_type 'abacus'"),
    "an encoder inside": ({"text_config": {"model_type": "t5", "is_encoder_decoder": True}}, "sequence-to-sequence"),
}


@pytest.mark.parametrize(("change", "mention"), REFUSED.values(), ids=REFUSED.keys())
def test_other_wrappers_are_refused(change: dict[str, Any], mention: str, tmp_path: Path) -> None:
    make_wrapper(tmp_path / "base", "llava")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(InputError, match=mention):
        Base.open(tmp_path / "base")
