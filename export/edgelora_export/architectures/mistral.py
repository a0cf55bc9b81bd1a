"""Mistral 7B and its relatives: Llama's block with a sliding window on every layer. Ministral 3 scales queries by position.

https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/mistral/modeling_mistral.py
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/ministral3/modeling_ministral3.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgelora_export.architectures.dense import make_decoder, make_layer, make_tables, read_config_sizes
from edgelora_export.decoder.rope import compute_query_scales, read_rope
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from edgelora_export.decoder.description import Decoder

# Defaults of transformers for keys that config.json lacks.
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}
_DEFAULTS_3: dict[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
_ROPE_3: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_QUERY_SCALES = "rotary.query_scales"


def read_mistral(config: dict[str, Any], context_length: int | None) -> Decoder:
    """Reads a MistralForCausalLM config. See read_decoder."""
    config = _DEFAULTS | config
    sizes = read_config_sizes(config, context_length)
    layers = [replace(make_layer(sizes, index), window=config["sliding_window"]) for index in range(sizes.layers)]
    return make_decoder("mistral", config, sizes, layers)


def read_ministral3(config: dict[str, Any], context_length: int | None) -> Decoder:
    """Reads a Ministral3ForCausalLM config. See read_decoder.

    Its queries have scales only where the context is longer than the original one.
    """
    config = _DEFAULTS_3 | config
    if not config.get("rope_parameters") and not config.get("rope_scaling"):
        config["rope_parameters"] = _ROPE_3
    rope = read_rope(config)
    rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    if rope.get("llama_4_scaling_beta") is None:
        raise InputError("the rope settings in config.json lack llama_4_scaling_beta, by which a Ministral 3 scales its queries")
    sizes = read_config_sizes(config, context_length)
    scales = compute_query_scales(rope, sizes.context_length)
    tables = make_tables(sizes, rope) | ({} if scales is None else {_QUERY_SCALES: scales})
    name = None if scales is None else _QUERY_SCALES
    layers = [
        replace(make_layer(sizes, index), window=config["sliding_window"], query_scales=name) for index in range(sizes.layers)
    ]
    return make_decoder("ministral3", config, sizes, layers, rotary=tables)
