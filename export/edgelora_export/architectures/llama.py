"""Llama 2 and 3.x, and every model that shares their config: SmolLM2, TinyLlama, Yi, OpenLLaMA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_export.architectures.dense import make_decoder, make_layer, read_config_sizes

if TYPE_CHECKING:
    from edgelora_export.decoder.description import Decoder

# Defaults of transformers for keys that config.json lacks.
_DEFAULTS: dict[str, Any] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}


def read_llama(config: dict[str, Any], context_length: int | None) -> Decoder:
    """Reads a LlamaForCausalLM config. See read_decoder."""
    config = _DEFAULTS | config
    sizes = read_config_sizes(config, context_length)
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    layers = [
        make_layer(sizes, index, qkv_bias=attention_bias, output_bias=attention_bias, mlp_bias=mlp_bias)
        for index in range(sizes.layers)
    ]
    return make_decoder("llama", config, sizes, layers)
