"""Checkpoints of a base with a delta that adds biases, a head or vocabulary rows load in transformers, with PEFT's logits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig

from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.base.safetensors_folder import INDEX
from edgelora_export.weights.checkpoint import write_checkpoint
from edgelora_runtime.errors import InputError
from tests.tiny import LINEARS, load_base, make_base, random_tokens, torch_logits
from tests.trained_changes import TrainedChange, train_somewhat

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_export.plan.variants import Delta

TOKENS = random_tokens(30, 290, seed=5)
# By name: settings of make_base, settings of train_somewhat, and what config.json says afterwards.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "untied by the head": (
        {"tie_word_embeddings": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"tie_word_embeddings": False, "vocab_size": 300},
    ),
    "untied by the embedding": (
        {"tie_word_embeddings": True},
        {"modules_to_save": ["embed_tokens"]},
        {"tie_word_embeddings": False, "vocab_size": 300},
    ),
    "tied": (
        {"tie_word_embeddings": True},
        {"trainable_token_indices": [5, 7]},
        {"tie_word_embeddings": True, "vocab_size": 300},
    ),
    "more tokens, tied": (
        {"tie_word_embeddings": True},
        {"rows": 306, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"tie_word_embeddings": True, "vocab_size": 306},
    ),
    "more tokens, untied": (
        {},
        {"rows": 306, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"tie_word_embeddings": False, "vocab_size": 306},
    ),
    "fewer tokens": ({}, {"rows": 290}, {"tie_word_embeddings": False, "vocab_size": 290}),
    "new biases of the attention": (
        {"head_dim": 24},
        {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
        {"attention_bias": True, "mlp_bias": False},
    ),
    "new biases of the MLP": (
        {},
        {"lora_bias": True, "target_modules": ["up_proj"]},
        {"attention_bias": False, "mlp_bias": True},
    ),
    "new biases everywhere": (
        {},
        {"lora_bias": True, "target_modules": list(LINEARS)},
        {"attention_bias": True, "mlp_bias": True},
    ),
    "changed biases": ({"attention_bias": True}, {"bias": "all"}, {"attention_bias": True, "mlp_bias": False}),
}


def write(base: Path, delta: Delta, folder: Path) -> dict[str, Any]:
    """Writes the checkpoint in the base's own types. Returns its config."""
    opened = Base.open(base)
    folder.mkdir()
    write_checkpoint(opened, read_decoder(opened.config), delta, folder, None, lambda done, total, what: None)
    config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return config


@pytest.mark.parametrize("name", KINDS)
def test_transformers_loads_pefts_logits(name: str, tmp_path: Path) -> None:
    shape, settings, said = KINDS[name]
    make_base(tmp_path / "base", **shape)
    trained = train_somewhat(tmp_path / "base", tmp_path / "adapter", **settings)
    config = write(tmp_path / "base", trained.change, tmp_path / "merged")
    assert {key: config[key] for key in said} == said
    auto: Any = AutoModelForCausalLM
    model, report = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    wanted = torch_logits(trained.model, TOKENS)
    found = torch_logits(model.eval(), TOKENS)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_stored_copy_of_a_tied_matrix_is_not_left_behind(tmp_path: Path) -> None:
    """transformers 5 takes a stored head beside tie_word_embeddings = true for an untied one if the two differ."""
    make_base(tmp_path / "base", tie_word_embeddings=True)
    trained = train_somewhat(tmp_path / "base", tmp_path / "adapter", trainable_token_indices=[5, 7])
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    write(tmp_path / "base", trained.change, tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    wanted = torch_logits(trained.model, TOKENS)
    assert np.abs(torch_logits(load_base(tmp_path / "merged"), TOKENS) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_new_tensors_of_a_sharded_base_are_in_its_index(tmp_path: Path) -> None:
    make_base(tmp_path / "whole", tie_word_embeddings=True)
    load_base(tmp_path / "whole").half().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    trained = train_somewhat(tmp_path / "base", tmp_path / "adapter", modules_to_save=["lm_head"])
    write(tmp_path / "base", trained.change, tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / INDEX).read_bytes())
    assert "lm_head.weight" in index["weight_map"]
    sizes = [tensor.nbytes for path in (tmp_path / "merged").glob("*.safetensors") for tensor in load_file(path).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.dtype == torch.float16
    head = torch.from_numpy(trained.change.weights["lm_head"])
    assert torch.equal(model.lm_head.weight, head.half())


def test_biases_that_the_kind_of_model_cannot_have_are_refused(tmp_path: Path) -> None:
    make_base(tmp_path / "base", config_class=MistralConfig)
    delta = TrainedChange({}, {"model.layers.1.mlp.up_proj": np.ones(96, np.float32)})
    with pytest.raises(InputError, match=r"mistral has no place for a bias of model\.layers\.1\.mlp\.up_proj; export"):
        write(tmp_path / "base", delta, tmp_path / "merged")
