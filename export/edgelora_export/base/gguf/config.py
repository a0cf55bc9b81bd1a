"""Makes transformers' config.json from the metadata of a GGUF file.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llm. What a key means for a model is in llama.cpp's src/models and
in its converters: https://github.com/ggml-org/llama.cpp/tree/master/conversion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.base.gguf.names import BLOCKS
from edgelora_export.base.gguf.rope import make_rope
from edgelora_export.base.gguf.values import Values
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgelora_export.base.gguf.header import Header

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_CLASSES = {
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "granite": ("granite", "GraniteForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM"),
}
# Settings of other models that share a name. They change the arithmetic, so that a file with one is not read without it.
_REFUSED = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.temperature_scale",
    "deepstack_mapping",
    "expert_count",
    "nextn_predict_layers",
)
# Layers of the 27B models, whose attention is scaled by the width per head instead of the head's size:
# https://github.com/google/gemma_pytorch/blob/014acb7ac4563a5f77c76d7ff98f31b568c16508/gemma/config.py
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
_GEMMA_PATTERN = {"gemma2": 2, "gemma3": 6}  # every so manyth layer sees all positions


def read_architecture(path: Path, header: Header) -> str:
    """Reads general.architecture. Raises InputError for one without a native graph, and for files that are not models."""
    general = Values(path, header.metadata, "general.")
    if (kind := general.text("type", "model")) != "model":
        raise general.fail("type", f"is {kind!r}; a base must be a whole model")
    architecture = general.text("architecture")
    if architecture not in BLOCKS:
        raise general.fail(
            "architecture", f"is {architecture!r}, which edgelora does not read from GGUF; supported: {', '.join(sorted(BLOCKS))}"
        )
    return architecture


def read_config(path: Path, header: Header) -> dict[str, Any]:
    """Reads the config that transformers would have saved beside the weights.

    Raises InputError for metadata that are missing or impossible, and for settings that edgelora's graphs do not have.
    """
    architecture = read_architecture(path, header)
    values = Values(path, header.metadata, f"{architecture}.")
    for key in _REFUSED:
        if header.metadata.get(values.prefix + key) not in (None, 0, False):
            raise values.fail(key, "is set, which edgelora's graphs do not have")
    if _EMBEDDING not in header.tensors:
        raise InputError(f"{path} has no tensor {_EMBEDDING}; a base must be a whole model")
    heads, hidden = values.integer("attention.head_count"), values.integer("embedding_length")
    if heads > hidden:
        raise values.fail("attention.head_count", f"is {heads}, more than the embedding_length {hidden}")
    size = values.integer("attention.key_length", hidden // heads)
    if values.integer("attention.value_length", size) != size:
        raise values.fail("attention.value_length", f"is not that of the keys, {size}")
    model_type, model_class = _CLASSES[architecture]
    config = {
        "architectures": [model_class],
        "model_type": model_type,
        "vocab_size": header.tensors[_EMBEDDING].shape[0],
        "hidden_size": hidden,
        "intermediate_size": values.integer("feed_forward_length"),
        "num_hidden_layers": values.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.integer("attention.head_count_kv", heads),
        "head_dim": size,
        "max_position_embeddings": values.integer("context_length"),
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": _HEAD not in header.tensors,
        "hidden_act": "silu",
    }
    _check_sizes(values, header, config)
    config |= make_rope(values, header, architecture, size)
    config |= _OWN[architecture](values, config)
    if any(name.endswith("attn_output.bias") for name in header.tensors):
        config["attention_bias"] = True
    if any(name.endswith("ffn_down.bias") for name in header.tensors):
        config["mlp_bias"] = True
    return config | _read_special_ids(path, header)


def _check_sizes(values: Values, header: Header, config: dict[str, Any]) -> None:
    """Raises InputError for sizes that the tensors do not have, before anything is made of such a size."""
    blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if len(blocks) != config["num_hidden_layers"]:
        raise values.fail("block_count", f"is {config['num_hidden_layers']}, but the file has tensors of {len(blocks)} blocks")
    width, hidden = config["num_attention_heads"] * config["head_dim"], config["hidden_size"]
    sizes = {
        _EMBEDDING: (config["vocab_size"], hidden),
        "blk.0.attn_output.weight": (hidden, width),
        "blk.0.ffn_down.weight": (hidden, config["intermediate_size"]),
    }
    for name, shape in sizes.items():
        found = header.tensors[name].shape if name in header.tensors else None
        if found != shape:
            raise InputError(f"{name} in {values.path} has shape {found}; the metadata give {shape}")


def _read_special_ids(path: Path, header: Header) -> dict[str, Any]:
    """Reads the ids of BOS, EOS and padding. None for one that the file has not, lest transformers' default stands in."""
    values = Values(path, header.metadata, "tokenizer.ggml.")
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {name: values.integer(key, least=0) if key in values else None for name, key in keys.items()}


def _read_plain(values: Values, config: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001  (one signature for all)
    if not values.flag("attention.causal", True):
        raise values.fail("attention.causal", "is false; only causal models can generate text")
    return {}


def _read_qwen(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return _read_plain(values, config) | {"use_sliding_window": False, "sliding_window": None}


def _read_olmo2(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    if values.integer("attention.sliding_window", 0, least=0):
        raise values.fail("attention.sliding_window", "is set, as in OLMo 3, which edgelora does not read from GGUF")
    return _read_plain(values, config)


def _read_phi3(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": values.integer("attention.sliding_window", 0, least=0) or None,
        "original_max_position_embeddings": values.integer(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
    }


def _read_granite(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    if not values.flag("rope.scaling.finetuned", True):
        raise values.fail("rope.scaling.finetuned", "is false: a Granite without positions, which edgelora's graphs do not have")
    return _read_plain(values, config) | {
        "attention_multiplier": values.number("attention.scale", 0.0) or config["head_dim"] ** -0.5,
        "embedding_multiplier": values.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": values.number("residual_scale", 0.0) or 1.0,
        "logits_scaling": values.number("logit_scale", 1.0),
    }


def _read_gemma(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    version = values.prefix.removesuffix(".")
    layers = config["num_hidden_layers"]
    width = config["hidden_size"] // config["num_attention_heads"]
    own = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width if layers == _GEMMA_27B[version] else config["head_dim"],
        "final_logit_softcapping": values.number("final_logit_softcapping", 30.0 if version == "gemma2" else 0.0) or None,
    }
    if version == "gemma2":
        own["attn_logit_softcapping"] = values.number("attn_logit_softcapping", 50.0) or None
    window = values.integer("attention.sliding_window", 4096 if version == "gemma2" else 0, least=0)
    slides = _read_pattern(values, layers, _GEMMA_PATTERN[version]) if window else [False] * layers
    kinds = ["sliding_attention" if sliding else "full_attention" for sliding in slides]
    return own | {"sliding_window": window or config["max_position_embeddings"], "layer_types": kinds}


def _read_pattern(values: Values, layers: int, default: int) -> list[bool]:
    """Reads which layers slide: from one flag per layer, or from a number n whose every nth layer does not."""
    key = "attention.sliding_window_pattern"
    if isinstance(values.metadata.get(values.prefix + key), np.ndarray):
        return [bool(slides) for slides in values.numbers(key, layers)]
    every = values.integer(key, default)
    return [(index + 1) % every != 0 for index in range(layers)]


_OWN: dict[str, Callable[[Values, dict[str, Any]], dict[str, Any]]] = {
    "gemma2": _read_gemma,
    "gemma3": _read_gemma,
    "granite": _read_granite,
    "llama": _read_plain,
    "olmo2": _read_olmo2,
    "phi3": _read_phi3,
    "qwen2": _read_qwen,
    "qwen3": _read_qwen,
    "smollm3": _read_plain,
}
