"""Phi-3, 3.5 and 4: fused projections, partial rotary embeddings, long RoPE, and a sliding window.

https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/phi3/modeling_phi3.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgelora_export.architectures.dense import ConfigSizes, make_decoder, make_layer, read_config_sizes
from edgelora_export.decoder.description import Part
from edgelora_export.decoder.rope import read_rope

if TYPE_CHECKING:
    from edgelora_export.decoder.description import Decoder, Layer

# Defaults of transformers for keys that config.json lacks.
_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}


def read_phi3(config: dict[str, Any], context_length: int | None) -> Decoder:
    """Reads a Phi3ForCausalLM config. See read_decoder."""
    config = _DEFAULTS | config
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if rope.get("rope_type", rope.get("type")) in ("su", "yarn"):  # names of longrope in early configs, as in transformers
        config["rope_parameters"] = rope | {"rope_type": "longrope"}
    sizes = read_config_sizes(config, context_length, partial_rotary_factor=read_rope(config)["partial_rotary_factor"])
    layers = [
        replace(_fuse_projections(make_layer(sizes, index), sizes, index), window=config["sliding_window"])
        for index in range(sizes.layers)
    ]
    return make_decoder("phi3", config, sizes, layers)


def _fuse_projections(layer: Layer, sizes: ConfigSizes, index: int) -> Layer:
    """Replaces the projections by one module for queries, keys and values, and one for gate and up."""
    rows = (sizes.queries, sizes.keys, sizes.values)
    width = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_size
    qkv = Part(f"model.layers.{index}.self_attn.qkv_proj", width, sizes.hidden, rows=rows)
    gate_up = Part(f"model.layers.{index}.mlp.gate_up_proj", 2 * sizes.intermediate, sizes.hidden)
    return replace(layer, qkv=replace(layer.qkv, parts=(qkv,)), gate_up=replace(layer.gate_up, parts=(gate_up,)))
