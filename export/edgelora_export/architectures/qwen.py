"""Qwen 2 and 2.5 add biases to queries, keys and values. Qwen 3 replaces them by norms on each head's query and key.

https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/qwen2/modeling_qwen2.py
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/qwen3/modeling_qwen3.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgelora_export.architectures.dense import ConfigSizes, make_decoder, make_layer, make_norm, read_config_sizes, read_windows

if TYPE_CHECKING:
    from edgelora_export.decoder.description import Decoder

# Defaults of transformers for keys that config.json lacks.
_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
}


def read_qwen2(config: dict[str, Any], context_length: int | None) -> Decoder:
    """Reads a Qwen2ForCausalLM config. See read_decoder."""
    config = _DEFAULTS | config
    sizes = read_config_sizes(config, context_length)
    layers = [
        replace(make_layer(sizes, index, qkv_bias=True), window=window)
        for index, window in enumerate(_read_windows(config, sizes))
    ]
    return make_decoder("qwen2", config, sizes, layers)


def read_qwen3(config: dict[str, Any], context_length: int | None) -> Decoder:
    """Reads a Qwen3ForCausalLM config. See read_decoder."""
    config = _DEFAULTS | {"head_dim": 128} | config
    sizes = read_config_sizes(config, context_length)
    bias = bool(config.get("attention_bias"))
    layers = [
        replace(
            make_layer(sizes, index, qkv_bias=bias, output_bias=bias),
            query_norm=make_norm(index, "attention.query_norm", "self_attn.q_norm", heads=replace(sizes.queries, heads=1)),
            key_norm=make_norm(index, "attention.key_norm", "self_attn.k_norm", heads=replace(sizes.keys, heads=1)),
            window=window,
        )
        for index, window in enumerate(_read_windows(config, sizes))
    ]
    return make_decoder("qwen3", config, sizes, layers)


def _read_windows(config: dict[str, Any], sizes: ConfigSizes) -> list[int | None]:
    """Reads the window of each layer. By default layers slide from max_window_layers on, if use_sliding_window is set."""
    slides = bool(config.get("use_sliding_window")) and config["sliding_window"] is not None
    window = config["sliding_window"] if slides else None
    default = [slides and index >= config["max_window_layers"] for index in range(sizes.layers)]
    return read_windows({**config, "sliding_window": window}, default)
