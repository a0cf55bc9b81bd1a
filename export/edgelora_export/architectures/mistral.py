"""Mistral 7B and its relatives: Llama's block with a sliding window on every layer.

https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/mistral/modeling_mistral.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgelora_export.architectures.dense import make_decoder, make_layer, read_config_sizes

if TYPE_CHECKING:
    from edgelora_export.decoder.description import Decoder

# Defaults of transformers for keys that config.json lacks.
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}


def read_mistral(config: dict[str, Any], context_length: int | None) -> Decoder:
    """Reads a MistralForCausalLM config. See read_decoder."""
    config = _DEFAULTS | config
    sizes = read_config_sizes(config, context_length)
    layers = [replace(make_layer(sizes, index), window=config["sliding_window"]) for index in range(sizes.layers)]
    return make_decoder("mistral", config, sizes, layers)
