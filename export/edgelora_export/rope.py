"""Rotary position tables from a model's config: the default form, `linear` and `llama3` scaling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


def read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rope settings of a config, in transformers 5's form, whichever version wrote it."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def rotary_frequencies(rope: dict[str, Any], head_size: int) -> Floats:
    """Angle per position for each rotary pair, float32 (head_size / 2,), in radians.

    llama3: Llama 3.1's smooth interpolation between kept and divided frequencies
    (https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/modeling_rope_utils.py, _compute_llama3_parameters).
    Raises InputError for another kind.
    """
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
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
    raise InputError(f"rope_type {kind!r} is not supported; supported: default, linear, llama3")


def rotary_tables(frequencies: Floats, context_length: int, padded_head_size: int) -> tuple[Floats, Floats]:
    """Cosines and sines, each float32 (context_length, padded_head_size / 2); padding pairs do not turn."""
    angles = np.arange(context_length, dtype=np.float32)[:, None] * frequencies[None, :]
    pad = padded_head_size // 2 - frequencies.size
    angles = np.pad(angles, ((0, 0), (0, pad)))
    return np.cos(angles), np.sin(angles)
