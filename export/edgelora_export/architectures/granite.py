"""Granite 3.x: Llama's block, with multipliers on embedding, attention, residual and logits.

https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/granite/modeling_granite.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgelora_export.architectures.dense import make_decoder, make_layer, read_config_sizes
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from edgelora_export.decoder.description import Decoder

# Defaults of transformers for keys that config.json lacks.
_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def read_granite(config: dict[str, Any], context_length: int | None) -> Decoder:
    """Reads a GraniteForCausalLM config. See read_decoder.

    Each block adds its update times residual_multiplier r. The graph's residual is the model's divided by r, so that it adds
    plain updates. Only norms read it, and they give the same for h / r as for h if their epsilon is divided by r².
    """
    config = _DEFAULTS | config
    residual, scaling = config["residual_multiplier"], config["logits_scaling"]
    if residual <= 0 or scaling <= 0:
        raise InputError(f"residual_multiplier {residual} and logits_scaling {scaling} must be more than 0")
    sizes = read_config_sizes(config, context_length)
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    layers = [
        make_layer(sizes, index, qkv_bias=attention_bias, output_bias=attention_bias, mlp_bias=mlp_bias)
        for index in range(sizes.layers)
    ]
    decoder = make_decoder("granite", config, sizes, layers)
    return replace(
        decoder,
        attention_scale=config["attention_multiplier"],
        norm_epsilon=decoder.norm_epsilon / residual**2,
        embedding_multiplier=config["embedding_multiplier"] / residual,
        final_norm=replace(decoder.final_norm, scale=1 / scaling),
    )
