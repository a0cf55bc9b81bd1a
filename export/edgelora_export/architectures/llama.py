"""Llama 2 and 3.x, and every model that shares their config: SmolLM2, TinyLlama, Yi, OpenLLaMA."""

from __future__ import annotations

from typing import Any

from edgelora_export.decoder import HEAD_MULTIPLE, Decoder, HeadPadding, Layer, Linear, Norm, Part
from edgelora_export.rope import read_rope, rotary_frequencies, rotary_tables
from edgelora_runtime.errors import InputError

CONTEXT_LIMIT = 32768  # the rotary table's default bound: 128k positions would cost 32 MB for a model of 0.7 GB


def read_llama(config: dict[str, Any], context_length: int | None) -> Decoder:
    """The Decoder of a LlamaForCausalLM config; see read_decoder."""
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    absent = [key for key in needed if key not in config]
    if absent:
        raise InputError(f"config.json lacks {', '.join(absent)}")
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"hidden_act {config['hidden_act']!r} is not supported for llama; supported: silu")
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or hidden // heads
    padded = -(-size // HEAD_MULTIPLE) * HEAD_MULTIPLE
    longest = config.get("max_position_embeddings", 2048)
    context = min(longest, CONTEXT_LIMIT) if context_length is None else context_length
    if not 0 < context <= longest:
        raise InputError(f"context_length = {context}: the model has positions 1 to {longest}")
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))

    def layer(index: int) -> Layer:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = (
            Part(f"{attention}.q_proj", heads * size, hidden, rows=HeadPadding(heads, size, padded, rotary=True)),
            Part(f"{attention}.k_proj", kv_heads * size, hidden, rows=HeadPadding(kv_heads, size, padded, rotary=True)),
            Part(f"{attention}.v_proj", kv_heads * size, hidden, rows=HeadPadding(kv_heads, size, padded, rotary=False)),
        )
        columns = HeadPadding(heads, size, padded, rotary=False)
        output = Part(f"{attention}.o_proj", hidden, heads * size, columns=columns)
        gate_up = (Part(f"{mlp}.gate_proj", inner, hidden), Part(f"{mlp}.up_proj", inner, hidden))
        down = Part(f"{mlp}.down_proj", hidden, inner)
        return Layer(
            attention_norm=Norm(f"layers.{index}.attention.norm", f"{prefix}.input_layernorm.weight"),
            qkv=Linear(f"layers.{index}.attention.qkv", qkv, attention_bias),
            output=Linear(f"layers.{index}.attention.output", (output,), attention_bias),
            mlp_norm=Norm(f"layers.{index}.mlp.norm", f"{prefix}.post_attention_layernorm.weight"),
            gate_up=Linear(f"layers.{index}.mlp.gate_up", gate_up, mlp_bias),
            down=Linear(f"layers.{index}.mlp.down", (down,), mlp_bias),
        )

    cos, sin = rotary_tables(rotary_frequencies(read_rope(config), size), context, padded)
    embedding = "model.embed_tokens.weight"
    return Decoder(
        architecture="llama",
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=padded,
        attention_scale=size**-0.5,
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        vocab_size=config["vocab_size"],
        context_length=context,
        rotary_cos=cos,
        rotary_sin=sin,
        embedding=embedding,
        layers=tuple(layer(index) for index in range(config["num_hidden_layers"])),
        final_norm=Norm("final.norm", "model.norm.weight"),
        head=embedding if config.get("tie_word_embeddings") else "lm_head.weight",
    )
