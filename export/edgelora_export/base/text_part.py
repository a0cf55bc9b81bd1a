"""The text part of a multimodal model, as a base of its own: its config, and its tensors under their plain names.

Each wrapper here was compared with its text part on text alone (tests/inputs/bases.py and tests/export/base/test_text_part.py).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from edgelora_export.base.tensors import RenamedTensors
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgelora_export.base.tensors import Tensors

# By model_type: the model_type of a text part that does not name its own, and whether its head is tied where no key says so.
# Defaults of transformers 5, https://github.com/huggingface/transformers/tree/v5.0.0/src/transformers/models
WRAPPERS: Mapping[str, tuple[str, bool]] = {
    "gemma3": ("gemma3_text", True),
    "idefics3": ("llama", False),
    "internvl": ("qwen2", True),
    "llava": ("llama", False),
    "llava_next": ("llama", False),
    "llava_onevision": ("qwen2", False),
    "mistral3": ("mistral", True),
    "qwen2_5_vl": ("qwen2_5_vl_text", False),
    "qwen2_vl": ("qwen2_vl_text", False),
    "qwen3_vl": ("qwen3_vl_text", False),
    "smolvlm": ("llama", False),
}
# Text parts whose positions have three axes. On text alone the axes are equal, so plain RoPE computes the same. Each becomes a
# plain model, with the defaults of its own class.
_QWEN2 = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8}
_QWEN2 |= {"use_sliding_window": False, "max_window_layers": 80}
_PLAIN: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2_5_vl_text": ("qwen2", _QWEN2),
    "qwen2_vl_text": ("qwen2", _QWEN2),
    "qwen3_vl_text": ("qwen3", {"max_position_embeddings": 128000, "rope_theta": 5e5}),
}
_CLASSES: Mapping[str, str] = {
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_MULTIMODAL_KEYS = ("vision_config", "audio_config", "speech_config", "thinker_config")
_SHARED_KEYS = ("_name_or_path", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "quantization_config", "torch_dtype")
# The names of a text part's tensors as different versions of transformers save them in a wrapper, and its head.
_BODY = re.compile(r"(?:language_model\.model|model\.(?:language_model|text_model)|model)\.((?:embed_tokens|layers|norm)\..+)")
_HEAD = re.compile(r"(?:(?:model\.)?language_model\.)?(lm_head\..+)")


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """True for a config of a model that takes more than text."""
    return any(isinstance(config.get(key), dict) for key in _MULTIMODAL_KEYS)


def take_text_config(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Makes the text part's config from a wrapper's, and copies any other config.

    What a wrapper says of tokens, type and quantization wins, and of tying too, as that is what transformers reads.
    Raises InputError if the wrapper has no text_config.
    """
    if config.get("model_type") not in WRAPPERS:
        return dict(config)
    own_type, own_tied = WRAPPERS[config["model_type"]]
    text = config.get("text_config")
    if text is None and own_type in _PLAIN:  # Qwen2-VL once wrote both parts into one table
        text = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "vision_config")}
    if not isinstance(text, dict):
        raise InputError(f"base {where}: config.json is of a {config['model_type']} and has no text_config; download it again")
    kind = text.get("model_type", own_type)
    plain, defaults = _PLAIN.get(kind, (kind, {}))
    tied = config.get("tie_word_embeddings", own_tied) or text.get("tie_word_embeddings", False)
    shared = {key: config[key] for key in _SHARED_KEYS if config.get(key) is not None}
    named = {"architectures": [_CLASSES[plain]]} if plain in _CLASSES else {}
    taken = {**defaults, **text, **shared, **named, "model_type": plain, "tie_word_embeddings": bool(tied)}
    for key in ("rope_parameters", "rope_scaling"):
        if kind in _PLAIN and isinstance(taken.get(key), dict):
            taken[key] = _flatten_axes(taken[key])
    return taken


def take_text_tensors(tensors: Tensors) -> RenamedTensors:
    """Picks the tensors of a wrapper's text part, and gives them the names that they have in a plain model."""
    sources = {}
    for name in tensors.files:
        if match := _BODY.fullmatch(name):
            sources[f"model.{match[1]}"] = name
        elif match := _HEAD.fullmatch(name):
            sources[match[1]] = name
    return RenamedTensors(tensors, sources)


def _flatten_axes(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Drops what tells the three axes of positions apart from rope settings."""
    kept = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    return kept | {key: "default" for key in ("rope_type", "type") if kept.get(key) == "mrope"}
