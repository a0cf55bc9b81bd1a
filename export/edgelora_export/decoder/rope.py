"""Rotary position tables from a model's config, with default, `linear`, `llama3`, `longrope` or `yarn` scaling."""

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
    "yarn": ("factor",),
}
_ORIGINAL = "original_max_position_embeddings"


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
    kind = rope["rope_type"]
    if kind in ("llama3", "longrope", "yarn") and (longest := config.get("max_position_embeddings")):
        rope[_ORIGINAL] = config.get(_ORIGINAL) or rope.get(_ORIGINAL) or longest
        if kind != "llama3" and (kind == "longrope" or "factor" in rope):
            rope["factor"] = rope.get("factor") or longest / rope[_ORIGINAL]
    if kind not in _REQUIRED_KEYS:
        raise InputError(f"rope_type {kind!r} is not supported; supported: {', '.join(_REQUIRED_KEYS)}")
    if absent := [key for key in _REQUIRED_KEYS[kind] if key not in rope]:
        raise InputError(f"the rope settings in config.json are {kind} and lack {', '.join(absent)}")
    return rope


def compute_rotary_frequencies(rope: Mapping[str, Any], rotary_size: int, context_length: int) -> Floats:
    """Computes the angle per position of each rotary pair, float32 (rotary_size / 2,), in radians.

    llama3: Llama 3.1's smooth interpolation between kept and divided frequencies. longrope: divides each frequency by its own
    factor, from one list for contexts of the original length and another for longer ones. yarn: arXiv 2309.00071, section 3.2.
    https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/modeling_rope_utils.py, _compute_llama3_parameters,
    _compute_longrope_parameters and _compute_yarn_parameters.
    Raises InputError if longrope's lists have another length.
    """
    exponents = np.arange(0, rotary_size, 2, dtype=np.float32) / np.float32(rotary_size)
    frequencies: Floats = (1.0 / np.float32(rope["rope_theta"]) ** exponents).astype(np.float32)
    kind = rope["rope_type"]
    if kind == "default":
        return frequencies
    if kind == "linear":
        slower: Floats = (frequencies / rope["factor"]).astype(np.float32)
        return slower
    if kind == "llama3":
        factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
        original = rope["original_max_position_embeddings"]
        wavelengths = 2 * math.pi / frequencies
        smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
        scaled: Floats = ((1 - smooth) * frequencies / factor + smooth * frequencies).astype(np.float32)
        return scaled
    if kind == "yarn":
        kept = _find_kept_shares(rope, rotary_size)
        divided = 1.0 / (np.float32(rope["factor"]) * np.float32(rope["rope_theta"]) ** exponents)
        mixed: Floats = (divided * (1 - kept) + frequencies * kept).astype(np.float32)
        return mixed
    assert kind == "longrope"
    which = "long_factor" if context_length > rope["original_max_position_embeddings"] else "short_factor"
    factors = np.array(rope[which], np.float32)
    if factors.shape != frequencies.shape:
        raise InputError(f"{which} in config.json has {factors.size} entries; heads rotate in {frequencies.size} pairs")
    return frequencies / factors


def _find_kept_shares(rope: Mapping[str, Any], rotary_size: int) -> Floats:
    """Finds yarn's share of each pair that keeps its frequency, float32 (rotary_size / 2,). The rest is divided by the factor.

    Pairs that turn more than beta_fast times in the original context keep theirs, those that turn less than beta_slow times do
    not, and the share falls linearly between. truncate: the two ends lie on whole pairs.
    """
    original, theta = rope[_ORIGINAL], rope["rope_theta"]

    def find_pair(turns: float) -> float:
        """Computes the pair that turns so many times in the original context."""
        return rotary_size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = find_pair(rope.get("beta_fast") or 32), find_pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_size - 1)
    width = last - first or 0.001
    divided = (np.arange(rotary_size // 2, dtype=np.float32) - np.float32(first)) / np.float32(width)
    shares: Floats = 1 - np.clip(divided, 0, 1)
    return shares


def compute_attention_factor(rope: Mapping[str, Any]) -> float:
    """Computes the factor of the cosines and sines of longrope and yarn, 1 for the other kinds.

    See compute_rotary_frequencies for the source.
    """
    kind = rope["rope_type"]
    if kind not in ("longrope", "yarn"):
        return 1.0
    factor = float(rope["factor"])
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(rope[_ORIGINAL]))
    scale, all_scale = rope.get("mscale"), rope.get("mscale_all_dim")
    if scale and all_scale:
        return float((0.1 * scale * math.log(factor) + 1) / (0.1 * all_scale * math.log(factor) + 1))
    return 0.1 * math.log(factor) + 1


def compute_query_scales(rope: Mapping[str, Any], context_length: int) -> Floats | None:
    """Computes the factor of the query at each position, float32 (context_length, 1), or None if all are 1.

    Llama 4 and Ministral 3 sharpen attention in texts longer than the original context: 1 + β · ln(1 + ⌊position / original⌋).
    https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/ministral3/modeling_ministral3.py,
    _get_llama_4_attn_scale
    """
    beta = rope.get("llama_4_scaling_beta")
    if not beta or context_length <= rope[_ORIGINAL]:
        return None
    turns = np.floor(np.arange(context_length, dtype=np.float32)[:, None] / np.float32(rope[_ORIGINAL]))
    scales: Floats = (1 + np.float32(beta) * np.log1p(turns)).astype(np.float32)
    return scales


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
