"""Writes genai_config.json, with which onnxruntime-genai opens a bundle's folder as one of its own models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgelora_export.decoder.description import Decoder

GENAI_CONFIG = "genai_config.json"
# onnxruntime-genai only checks that the type is a decoder's. Version 0.18 does not know every type, so these map to one it knows.
_TYPES = {"olmo2": "olmo"}


def pack_genai_config(
    decoder: Decoder, filename: str, *, settings: Mapping[str, Any], end_tokens: Sequence[int], in_place_cache: bool = True
) -> bytes:
    """Packs the bytes of genai_config.json for the graph `filename`.

    settings: the base's config.json, overridden by generation_config.json. Only special tokens are read from it. in_place_cache:
    True if one buffer can hold both the past and the present of a step.
    Keys are those of onnxruntime-genai's own builder:
    https://github.com/microsoft/onnxruntime-genai/blob/v0.18.0/src/python/py/models/builders/base.py
    """
    model: dict[str, Any] = {
        "type": _TYPES.get(decoder.architecture, decoder.architecture),
        "vocab_size": decoder.vocab_size,
        "context_length": decoder.context_length,
        **_special_tokens(settings, end_tokens, decoder.vocab_size),
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": filename,
            "head_size": decoder.head_size,  # of the cache, padding included
            "hidden_size": decoder.hidden_size,
            "num_attention_heads": decoder.heads,
            "num_key_value_heads": decoder.kv_heads,
            "num_hidden_layers": len(decoder.layers),
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    search = {
        "do_sample": False,
        "max_length": decoder.context_length,
        "min_length": 0,
        "num_beams": 1,  # the graph reads one sequence at a time
        "num_return_sequences": 1,
        "past_present_share_buffer": in_place_cache,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    return (json.dumps({"model": model, "search": search}, indent=1) + "\n").encode()


def _special_tokens(settings: Mapping[str, Any], end_tokens: Sequence[int], vocab_size: int) -> dict[str, Any]:
    """Returns the ids of the known special tokens. Without a padding token, the first end token pads, as in the builder."""
    tokens: dict[str, Any] = {}
    if end_tokens:
        tokens["eos_token_id"] = list(end_tokens)
    if (begin := settings.get("bos_token_id")) is not None:
        tokens["bos_token_id"] = begin
    padding = settings.get("pad_token_id")
    if padding is not None and 0 <= padding < vocab_size:
        tokens["pad_token_id"] = padding
    elif end_tokens:
        tokens["pad_token_id"] = end_tokens[0]
    return tokens
