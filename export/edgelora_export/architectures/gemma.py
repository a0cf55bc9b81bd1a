"""Gemma 2 and the text models of Gemma 3: norms before and after attention and MLP, soft caps, local and global layers.

https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/gemma2/modeling_gemma2.py
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/gemma3/modeling_gemma3.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgelora_export.architectures.dense import (
    ConfigSizes,
    make_decoder,
    make_layer,
    make_norm,
    make_tables,
    read_config_sizes,
    read_windows,
)
from edgelora_export.decoder.rope import read_rope
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from edgelora_export.decoder.description import Decoder, HeadPadding, Layer, Norm

# Defaults of transformers for keys that config.json lacks.
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_DEFAULTS_2: dict[str, Any] = {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_DEFAULTS_3: dict[str, Any] = {"max_position_embeddings": 131072, "sliding_window_pattern": 6}
_OFFSET = 1.0  # Gemma's norms multiply by 1 + weight


def read_gemma2(config: dict[str, Any], context_length: int | None) -> Decoder:
    """Reads a Gemma2ForCausalLM config. See read_decoder."""
    config = _DEFAULTS | _DEFAULTS_2 | config
    sizes = read_config_sizes(config, context_length)
    windows = read_windows(config, [index % 2 == 0 for index in range(sizes.layers)])
    layers = [_make_layer(config, sizes, index, window) for index, window in enumerate(windows)]
    decoder = make_decoder("gemma2", config, sizes, layers, activation="hidden_activation")
    return replace(_set_gemma_options(decoder, config), attention_cap=config["attn_logit_softcapping"])


def read_gemma3(config: dict[str, Any], context_length: int | None) -> Decoder:
    """Reads a Gemma3ForCausalLM config (gemma3_text). See read_decoder."""
    config = _DEFAULTS | _DEFAULTS_3 | config
    sizes = read_config_sizes(config, context_length)
    pattern = config["sliding_window_pattern"]
    windows = read_windows(config, [(index + 1) % pattern != 0 for index in range(sizes.layers)])
    layers = [
        replace(
            _make_layer(config, sizes, index, window),
            query_norm=_make_norm(index, "attention.query_norm", "self_attn.q_norm", replace(sizes.queries, heads=1)),
            key_norm=_make_norm(index, "attention.key_norm", "self_attn.k_norm", replace(sizes.keys, heads=1)),
            rotary="rotary" if window is None else "rotary.local",
        )
        for index, window in enumerate(windows)
    ]
    global_rope, local_rope = _read_ropes(config)
    tables = make_tables(sizes, global_rope) | make_tables(sizes, local_rope, "rotary.local")
    decoder = make_decoder("gemma3_text", config, sizes, layers, rotary=tables, activation="hidden_activation")
    return _set_gemma_options(decoder, config)


def _make_norm(index: int, name: str, tensor: str, heads: HeadPadding | None = None) -> Norm:
    return make_norm(index, name, tensor, offset=_OFFSET, heads=heads)


def _make_layer(config: dict[str, Any], sizes: ConfigSizes, index: int, window: int | None) -> Layer:
    bias = bool(config.get("attention_bias"))
    return replace(
        make_layer(sizes, index, qkv_bias=bias, output_bias=bias),
        attention_norm=_make_norm(index, "attention.norm", "input_layernorm"),
        attention_post_norm=_make_norm(index, "attention.post_norm", "post_attention_layernorm"),
        mlp_norm=_make_norm(index, "mlp.norm", "pre_feedforward_layernorm"),
        mlp_post_norm=_make_norm(index, "mlp.post_norm", "post_feedforward_layernorm"),
        window=window,
    )


def _set_gemma_options(decoder: Decoder, config: dict[str, Any]) -> Decoder:
    if config.get("use_bidirectional_attention"):
        raise InputError("use_bidirectional_attention is set; only causal models can generate text")
    return replace(
        decoder,
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        logits_cap=config.get("final_logit_softcapping"),
        embedding_multiplier=decoder.hidden_size**0.5,
        final_norm=replace(decoder.final_norm, offset=_OFFSET),
        wide_residual=True,
    )


def _read_ropes(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the rope settings of global and of local layers.

    transformers 5 nests both under rope_parameters. Before, rope_scaling held those of global layers.
    """
    nested = config.get("rope_parameters") or {}
    nested = {**nested, "full_attention": {**(nested.get("full_attention") or {}), **(config.get("rope_scaling") or {})}}
    thetas = {"full_attention": config.get("rope_theta", 1000000.0), "sliding_attention": config.get("rope_local_base_freq", 1e4)}
    shared = {"max_position_embeddings": config["max_position_embeddings"]}
    ropes = (read_rope(shared | {"rope_parameters": nested.get(kind), "rope_theta": theta}) for kind, theta in thetas.items())
    return next(ropes), next(ropes)
