"""Tiny real models for the tests: a random Llama made by transformers, a tokenizer trained on the spot, adapters made by PEFT."""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.bundle.builder import build_bundle
from edgelora_export.bundle.plan import BundlePlan
from edgelora_export.plan.variants import Quantization, Variant

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora_export.bundle.progress import OnProgress
    from edgelora_runtime.bundle.manifest import Manifest

    Floats = NDArray[np.float32]

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = LINEARS[:4]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
_TRAINING_TEXT = (
    "the cat sat on the mat",
    "a day in the sun, and the moon",
    "one two three four",
    "Größe → naïve café 日本語 🙂",
)


def make_tokenizer() -> Any:
    """A byte-level BPE of 300 entries with <s>, </s> and a chat template. Each call has its own: trainers change theirs."""
    return copy.deepcopy(_train_tokenizer())


@cache
def _train_tokenizer() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT * 4, trainer)
    wrapper: Any = PreTrainedTokenizerFast
    return wrapper(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_base(folder: Path, *, seed: int = 0, config_class: Any = LlamaConfig, **settings: Any) -> Any:
    """Saves a random Llama, or another model, with its tokenizer, and returns it. Its weights make the logits differ."""
    shape = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config_class(**{**shape, **settings}))
    model = model.float().eval()
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1, which would hide their absence
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def make_adapter(base: Path, folder: Path, *, seed: int = 1, size: float = 0.05, **settings: Any) -> None:
    """Saves a random LoRA adapter, made by PEFT, whose B is not zero."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(load_base(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, size)
    model.save_pretrained(str(folder))


def load_base(folder: Path) -> Any:
    """The base in float32, as transformers loads it. Any: transformers' own annotations don't survive strict checking."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def torch_logits(model: Any, tokens: Sequence[int]) -> Floats:
    """Logits of every position as torch computes them, float32 (T, V)."""
    with torch.no_grad():
        logits: Floats = model(torch.tensor([list(tokens)])).logits[0].float().numpy()
    return logits


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """What transformers' own greedy generate() writes after a prompt, end token excluded."""
    with torch.no_grad():
        ids = torch.tensor([list(prompt)])
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=1, pad_token_id=1
        )[0, len(prompt) :].tolist()
    return written[: written.index(1)] if 1 in written else list(written)


def random_tokens(count: int, vocabulary: int = 300, seed: int = 0) -> list[int]:
    """Token ids that are none of the special ones."""
    return [int(token) for token in np.random.default_rng(seed).integers(2, vocabulary, count)]


def export_base(base: Path, output: Path, **quantization: Any) -> Manifest:
    """A bundle with the bare base alone."""
    settings = {"bits": 32, **quantization}
    return build_variants(Base.open(base), [Variant("base")], output, quantization=Quantization(**settings))


def build_variants(
    base: Base,
    variants: Sequence[Variant],
    output: Path,
    *,
    context_length: int | None = None,
    on_progress: OnProgress = lambda done, total, what: None,
    **settings: Any,
) -> Manifest:
    """Builds a bundle of variants; settings are fields of BundlePlan."""
    plan = BundlePlan(base, read_decoder(base.config, context_length), tuple(variants), **settings)
    return build_bundle(plan, output, on_progress=on_progress)
