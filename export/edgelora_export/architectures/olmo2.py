"""OLMo 2: norms after attention and MLP instead of before them, and norms over all queries and over all keys.

https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/olmo2/modeling_olmo2.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgelora_export.architectures.dense import make_decoder, make_layer, make_norm, read_config_sizes

if TYPE_CHECKING:
    from edgelora_export.decoder.description import Decoder

# Defaults of transformers for keys that config.json lacks.
_DEFAULTS: dict[str, Any] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}


def read_olmo2(config: dict[str, Any], context_length: int | None) -> Decoder:
    """Reads an Olmo2ForCausalLM config. See read_decoder."""
    config = _DEFAULTS | config
    sizes = read_config_sizes(config, context_length)
    bias = bool(config.get("attention_bias"))
    layers = [
        replace(
            make_layer(sizes, index, qkv_bias=bias, output_bias=bias),
            attention_norm=None,
            query_norm=make_norm(index, "attention.query_norm", "self_attn.q_norm", heads=sizes.queries),
            key_norm=make_norm(index, "attention.key_norm", "self_attn.k_norm", heads=sizes.keys),
            attention_post_norm=make_norm(index, "attention.post_norm", "post_attention_layernorm"),
            mlp_norm=None,
            mlp_post_norm=make_norm(index, "mlp.post_norm", "post_feedforward_layernorm"),
        )
        for index in range(sizes.layers)
    ]
    return make_decoder("olmo2", config, sizes, layers)
