"""Rotary position tables from a model's config, with default, `linear`, `llama3` or `longrope` scaling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


_REQUIRED_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}


def read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the rope settings of a config, written by any version of transformers, in transformers 5's form.

    Raises InputError for other kinds of scaling, and for settings that lack a key.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rope["partial_rotary_factor"] is None:
        rope["partial_rotary_factor"] = 1.0
    if rope["rope_type"] == "longrope":
        longest = config["max_position_embeddings"]
        original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings", longest)
        rope["original_max_position_embeddings"] = original
        rope["factor"] = rope.get("factor") or longest / original
    kind = rope["rope_type"]
    if kind not in _REQUIRED_KEYS:
        raise InputError(f"rope_type {kind!r} is not supported; supported: {', '.join(_REQUIRED_KEYS)}")
    if absent := [key for key in _REQUIRED_KEYS[kind] if key not in rope]:
        raise InputError(f"the rope settings in config.json are {kind} and lack {', '.join(absent)}")
    return rope


def compute_rotary_frequencies(rope: Mapping[str, Any], rotary_size: int, context_length: int) -> Floats:
    """Computes the angle per position of each rotary pair, float32 (rotary_size / 2,), in radians.

    llama3: Llama 3.1's smooth interpolation between kept and divided frequencies. longrope: divides each frequency by its own
    factor, from one list for contexts of the original length and another for longer ones.
    https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/modeling_rope_utils.py, _compute_llama3_parameters
    and _compute_longrope_parameters.
    Raises InputError if longrope's lists have another length.
    """
    exponents = np.arange(0, rotary_size, 2, dtype=np.float32) / np.float32(rotary_size)
    frequencies: Floats = (1.0 / np.float32(rope["rope_theta"]) ** exponents).astype(np.float32)
    kind = rope["rope_type"]
    if kind == "default":
        return frequencies
    if kind == "linear":
        divided: Floats = (frequencies / rope["factor"]).astype(np.float32)
        return divided
    if kind == "llama3":
        factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
        original = rope["original_max_position_embeddings"]
        wavelengths = 2 * math.pi / frequencies
        smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
        scaled: Floats = ((1 - smooth) * frequencies / factor + smooth * frequencies).astype(np.float32)
        return scaled
    assert kind == "longrope"
    which = "long_factor" if context_length > rope["original_max_position_embeddings"] else "short_factor"
    factors = np.array(rope[which], np.float32)
    if factors.shape != frequencies.shape:
        raise InputError(f"{which} in config.json has {factors.size} entries; heads rotate in {frequencies.size} pairs")
    return frequencies / factors


def compute_attention_factor(rope: Mapping[str, Any]) -> float:
    """Computes the factor of longrope's cosines and sines (_compute_longrope_parameters), 1 for the other kinds."""
    if rope["rope_type"] != "longrope":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = rope["factor"]
    return math.sqrt(1 + math.log(factor) / math.log(rope["original_max_position_embeddings"])) if factor > 1 else 1.0


def compute_rotary_tables(
    rope: Mapping[str, Any], rotary_size: int, context_length: int, padded_head_size: int
) -> tuple[Floats, Floats]:
    """Computes cosines and sines, each float32 (context_length, padded_head_size / 2).

    Pairs after the rotary ones do not rotate: their cosines are 1, their sines 0.
    """
    frequencies = compute_rotary_frequencies(rope, rotary_size, context_length)
    angles = np.arange(context_length, dtype=np.float32)[:, None] * frequencies[None, :]
    padding = ((0, 0), (0, padded_head_size // 2 - frequencies.size))
    factor = np.float32(compute_attention_factor(rope))
    return np.pad(np.cos(angles) * factor, padding, constant_values=1), np.pad(np.sin(angles) * factor, padding)
