"""SmolLM3: Llama's block, with some layers that have no rotary positions.

https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/smollm3/modeling_smollm3.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgelora_export.architectures.dense import make_decoder, make_layer, read_config_sizes, read_windows
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from edgelora_export.decoder.description import Decoder

# Defaults of transformers for keys that config.json lacks.
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 2000000.0,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}


def read_smollm3(config: dict[str, Any], context_length: int | None) -> Decoder:
    """Reads a SmolLM3ForCausalLM config. See read_decoder."""
    config = _DEFAULTS | config
    sizes = read_config_sizes(config, context_length)
    uses_rope = config.get("no_rope_layers")  # despite its name, 1 marks a layer with rotary positions
    if uses_rope is None:
        uses_rope = [(index + 1) % config["no_rope_layer_interval"] for index in range(sizes.layers)]
    if len(uses_rope) < sizes.layers:
        raise InputError(f"no_rope_layers in config.json has {len(uses_rope)} entries for {sizes.layers} layers")
    windows: list[int | None] = [None] * sizes.layers
    if config.get("use_sliding_window") and config.get("sliding_window") is not None:
        windows = read_windows(config, [not rotates for rotates in uses_rope[: sizes.layers]])
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    layers = [
        replace(
            make_layer(sizes, index, qkv_bias=attention_bias, output_bias=attention_bias, mlp_bias=mlp_bias),
            rotary="rotary" if uses_rope[index] else None,
            window=windows[index],
        )
        for index in range(sizes.layers)
    ]
    return make_decoder("smollm3", config, sizes, layers)
