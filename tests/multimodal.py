"""Tiny random multimodal models made by transformers, whose text parts are bases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from tests.tiny import make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TEXT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_SQUARE = {**_VISION, "image_size": 28, "patch_size": 14}
_CLIP, _SIGLIP = {**_SQUARE, "model_type": "clip_vision_model"}, {**_SQUARE, "model_type": "siglip_vision_model"}
_PIXTRAL = {**_SQUARE, "model_type": "pixtral", "head_dim": 16}
_QWEN2 = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14}
_QWEN25 = {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32}
_QWEN3 = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
_AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7, "num_hidden_layers": 3}
# By the name of the wrapper: its config's class, and the config's settings.
WRAPPERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma3": (
        transformers.Gemma3Config,
        {
            "text_config": {**TEXT, **_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral3 of ministral3": (
        transformers.Mistral3Config,
        {
            "text_config": {
                **TEXT,
                "model_type": "ministral3",
                "head_dim": 16,
                "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0},
            },
            "vision_config": _PIXTRAL,
        },
    ),
    "mistral3 of mistral": (
        transformers.Mistral3Config,
        {
            "text_config": {**TEXT, "model_type": "mistral", "head_dim": 16, "sliding_window": 7},
            "vision_config": _PIXTRAL,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_vl": (
        transformers.Qwen3VLConfig,
        {
            "text_config": {**TEXT, "head_dim": 16, "rope_parameters": {**_AXES, "mrope_interleaved": True}},
            "vision_config": {**_QWEN3, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen2_vl": (transformers.Qwen2VLConfig, {"text_config": {**TEXT, "rope_parameters": _AXES}, "vision_config": _QWEN2}),
    "qwen2_5_vl": (
        transformers.Qwen2_5_VLConfig,
        {
            "text_config": {**TEXT, "rope_parameters": _AXES},
            "vision_config": {**_QWEN25, "fullatt_block_indexes": [0]},
            "tie_word_embeddings": True,
        },
    ),
    "llava": (transformers.LlavaConfig, {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": _CLIP}),
    "llava_next": (
        transformers.LlavaNextConfig,
        {"text_config": {**TEXT, "model_type": "mistral", "sliding_window": None}, "vision_config": _CLIP},
    ),
    "llava_onevision": (
        transformers.LlavaOnevisionConfig,
        {"text_config": {**TEXT, "model_type": "qwen2"}, "vision_config": _SIGLIP},
    ),
    "internvl": (
        transformers.InternVLConfig,
        {
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**_VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        },
    ),
    "idefics3": (transformers.Idefics3Config, {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": _SQUARE}),
    "smolvlm": (transformers.SmolVLMConfig, {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": _SQUARE}),
}


def make_wrapper(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Saves a random wrapper in a type, with a tokenizer, and returns it as transformers loads it, in float32."""
    config_class, settings = WRAPPERS[name]
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForImageTextToText
    model = auto.from_config(config_class(**settings)).float()
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1, which would hide their absence
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
            elif "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 2:
                parameter.normal_(0.0, 0.15)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return auto.from_pretrained(folder, dtype=torch.float32).eval()
