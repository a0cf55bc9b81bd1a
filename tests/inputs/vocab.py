"""Adapters that change biases, embedding, head or vocabulary: PEFT's unmerged forward against a float32 bundle.

merge_and_unload is the reference of none of them: PEFT adds a change of one of two tied matrices to both, and does not merge
lora_bias into a base without biases.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.plan.variants import Quantization, Variant
from edgelora_export.weights.checkpoint import write_checkpoint
from edgelora_runtime import Runtime
from edgelora_runtime.errors import InputError
from tests.inputs.cases import Case
from tests.tiny import build_variants, make_base, random_tokens, torch_logits
from tests.trained_changes import train_somewhat

if TYPE_CHECKING:
    from pathlib import Path

TIED = {"tie_word_embeddings": True}
TOKENS = random_tokens(30, 290, seed=5)
BOTH = ["embed_tokens", "lm_head"]
ADDED = list(range(300, 306))


def check_export(folder: Path, *, base: dict[str, Any], adapter: dict[str, Any]) -> str:
    """Exports a variant in float32, and compares its logits with PEFT's. Base and variant must not disturb each other."""
    make_base(folder / "base", **base)
    trained = train_somewhat(folder / "base", folder / "adapter", **adapter)
    variants = [Variant("base"), Variant("v", {"a": 1.0}, delta=trained.change)]
    build_variants(Base.open(folder / "base"), variants, folder / "bundle", quantization=Quantization(bits=32))
    with Runtime(folder / "bundle") as runtime:
        return compare(runtime.logits(TOKENS, variant="v"), torch_logits(trained.model, TOKENS))


def check_checkpoint(folder: Path, *, base: dict[str, Any], adapter: dict[str, Any]) -> str:
    """Writes base plus adapter as a checkpoint, which transformers loads, and compares its logits with PEFT's."""
    make_base(folder / "base", **base)
    trained = train_somewhat(folder / "base", folder / "adapter", **adapter)
    opened = Base.open(folder / "base")
    (folder / "merged").mkdir()
    decoder = read_decoder(opened.config)
    write_checkpoint(opened, decoder, trained.change, folder / "merged", None, lambda done, total, what: None)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    return compare(torch_logits(model.eval(), TOKENS), torch_logits(trained.model, TOKENS))


def check_live(folder: Path, *, base: dict[str, Any], adapter: dict[str, Any]) -> str:
    """Asks for a live variant. Returns the line that refuses it, and checks that nothing was written."""
    make_base(folder / "base", **base)
    trained = train_somewhat(folder / "base", folder / "adapter", **adapter)
    variant = Variant("v", {"a": 1.0}, delta=trained.change, live={"a": 1.0})
    try:
        build_variants(Base.open(folder / "base"), [variant], folder / "bundle")
    except InputError as error:
        assert not (folder / "bundle").exists()
        assert "use kind = 'merged'" in str(error)
        return str(error)
    raise AssertionError("a live variant cannot hold this change")


def compare(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> str:
    assert found.shape == wanted.shape
    difference = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    assert difference <= 1e-5
    return f"equal to {difference:.0e} in {json.dumps(list(found.shape))} logits"


EXPORTED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "LoRA on the embedding of a tied base": (
        TIED,
        {"target_modules": ["q_proj", "embed_tokens"]},
        "the head stays the base's",
    ),
    "LoRA on the head of a tied base": (TIED, {"target_modules": ["q_proj", "lm_head"]}, "the embedding stays the base's"),
    "LoRA on both of two tied matrices, apart": (TIED, {"target_modules": ["q_proj", *BOTH]}, "two changes"),
    "LoRA on two tied matrices, ensure_weight_tying": (
        TIED,
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        "one change of one matrix",
    ),
    "modules_to_save of two tied matrices, apart": (TIED, {"modules_to_save": BOTH}, "two matrices"),
    "modules_to_save of two tied matrices, ensure_weight_tying": (
        TIED,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        "one matrix",
    ),
    "trainable_token_indices on a tied base": (TIED, {"trainable_token_indices": [5, 7]}, "the head's rows change too"),
    "trainable_token_indices on an untied base": ({}, {"trainable_token_indices": [5, 7]}, "the head stays the base's"),
    "six tokens added to a tied base": (TIED, {"rows": 306, "trainable_token_indices": ADDED}, "306 logits"),
    "six tokens added to an untied base": ({}, {"rows": 306, "modules_to_save": BOTH}, "306 logits"),
    "an embedding cut to the tokenizer's size": ({}, {"rows": 290}, "290 logits"),
    "lora_bias on a base without biases": (
        {"head_dim": 24},
        {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]},
        "layers gain a bias",
    ),
    "bias = all on Qwen 2": ({"config_class": Qwen2Config, "vocab_size": 304}, {"bias": "all"}, "every bias changes"),
}

CASES = [
    *(
        Case(name, "adapter", theirs, "equal", partial(check_export, base=base, adapter=adapter))
        for name, (base, adapter, theirs) in EXPORTED.items()
    ),
    Case(
        "an untied head merged into a tied base's checkpoint",
        "adapter",
        "a checkpoint with a head of its own",
        "equal",
        partial(check_checkpoint, base=TIED, adapter={"target_modules": ["q_proj", "lm_head"]}),
    ),
    Case(
        "lora_bias merged into a checkpoint without biases",
        "adapter",
        "PEFT's merge refuses; its forward adds them",
        "equal",
        partial(check_checkpoint, base={}, adapter={"lora_bias": True, "target_modules": ["q_proj", "up_proj"]}),
    ),
    Case(
        "a live variant of an adapter with biases",
        "adapter",
        "adds the biases",
        "refused",
        partial(check_live, base={}, adapter={"lora_bias": True}),
    ),
    Case(
        "a live variant of an adapter with more tokens",
        "adapter",
        "306 logits",
        "refused",
        partial(check_live, base=TIED, adapter={"rows": 306}),
    ),
]
