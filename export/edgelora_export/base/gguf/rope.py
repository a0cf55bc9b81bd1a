"""Reads the rotary settings of a GGUF file, from its metadata and from its tensors of frequency factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.base.gguf.names import ROPE_FACTORS
from edgelora_export.base.gguf.tensors import read_rows
from edgelora_export.decoder.rope import compute_rotary_frequencies

if TYPE_CHECKING:
    from edgelora_export.base.gguf.header import Header
    from edgelora_export.base.gguf.values import Values

_FREQUENCIES, _LONG, _SHORT = ROPE_FACTORS
_LOCAL_THETA = 10000.0  # of Gemma 3's sliding layers
_DEFAULT_THETA = 10000.0
_MOST_THETA = 1e15


def make_rope(values: Values, header: Header, architecture: str, head_size: int) -> dict[str, Any]:
    """Makes the entries of config.json for the rotary positions. head_size: entries of a head.

    Llama 3.1 and later carry `rope_freqs.weight`, a divisor per frequency, in place of the settings that it came from. Where
    Llama's settings give the same divisors, the config says `llama3`, else it carries the divisors as a `longrope` does.
    Raises InputError for settings that edgelora's graphs do not have.
    """
    size = values.integer("rope.dimension_count", head_size, least=2)
    if size > head_size or (size != head_size and architecture != "phi3"):
        raise values.fail("rope.dimension_count", f"is {size} for heads of {head_size}, which only phi3 has")
    rope = {"rope_theta": _read_theta(values, "rope.freq_base", _DEFAULT_THETA)} | _read_scaling(values)
    if architecture == "phi3" and size != head_size:
        rope["partial_rotary_factor"] = size / head_size
    if _LONG in header.tensors:
        rope |= _carry(values, _read_factors(values, header, _SHORT, size), _read_factors(values, header, _LONG, size))
    elif _FREQUENCIES in header.tensors:
        factors = _read_factors(values, header, _FREQUENCIES, size)
        rope |= _find_llama3(rope["rope_theta"], factors) or _carry(values, factors, factors)
    if architecture != "gemma3":
        return {"rope_parameters": rope}
    local = {"rope_type": "default", "rope_theta": _read_theta(values, "rope.freq_base_swa", _LOCAL_THETA)}
    return {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}


def _read_theta(values: Values, key: str, default: float) -> float:
    if not 1.0 < (theta := values.number(key, default)) <= _MOST_THETA:
        raise values.fail(key, f"is {theta}, no base of rotary frequencies")
    return theta


def _read_scaling(values: Values) -> dict[str, Any]:
    kind = values.text("rope.scaling.type", "none")
    factor = values.number("rope.scaling.factor", values.number("rope.scale_linear", 0.0))
    if factor != 0.0 and not 1e-3 < factor < 1e6:
        raise values.fail("rope.scaling.factor", f"is {factor}, no factor of a context length")
    if kind == "none" and factor not in (0.0, 1.0):
        kind = "linear"  # llama.cpp's default for files that give a factor alone
    if kind == "linear" and factor not in (0.0, 1.0):
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        yarn = {"rope_type": "yarn", "factor": factor}
        yarn["original_max_position_embeddings"] = values.integer("rope.scaling.original_context_length")
        if values.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
            raise values.fail("rope.scaling.yarn_ext_factor", "is not 1, which transformers' yarn does not have")
        names = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        return yarn | {
            name: values.number(f"rope.scaling.{key}") for name, key in names.items() if f"rope.scaling.{key}" in values
        }
    if kind not in ("none", "linear", "longrope"):  # longrope's settings are tensors
        raise values.fail("rope.scaling.type", f"is {kind!r}; supported: linear, longrope, none, yarn")
    return {"rope_type": "default"}


def _read_factors(values: Values, header: Header, name: str, size: int) -> np.ndarray[Any, Any]:
    """Reads one divisor per rotated pair, float32 (size / 2,)."""
    place = header.tensors.get(name)
    if place is None or place.shape != (size // 2,):
        raise values.fail("rope.dimension_count", f"needs a tensor {name} of {size // 2} entries")
    factors = np.asarray(read_rows(place, name, 0, 1), np.float32).reshape(-1)
    if not np.isfinite(factors).all() or (factors <= 0).any():
        raise values.fail("rope.dimension_count", f"stands beside a tensor {name} with entries that are not more than 0")
    return factors


def _carry(values: Values, short: np.ndarray[Any, Any], long: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Makes longrope settings from divisors for texts up to the original context length, and for longer ones."""
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": [float(str(factor)) for factor in short],
        "long_factor": [float(str(factor)) for factor in long],
        "original_max_position_embeddings": values.integer(
            "rope.scaling.original_context_length", values.integer("context_length")
        ),
    }
    if "rope.scaling.attn_factor" in values or short is long:
        rope["attention_factor"] = values.number("rope.scaling.attn_factor", 1.0)
    return rope


def _find_llama3(theta: float, factors: np.ndarray[Any, Any]) -> dict[str, Any] | None:
    """Returns Llama 3's settings if they give these divisors, else None.

    Meta released them with one original length and one pair of bounds, and with the factors 8 and 32. The largest divisor is the
    factor: https://github.com/meta-llama/llama-models/blob/v0.0.6/models/llama3/reference_impl/model.py
    """
    rope = {
        "rope_type": "llama3",
        "factor": float(str(factors.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    size = 2 * len(factors)
    plain = compute_rotary_frequencies({"rope_type": "default", "rope_theta": theta}, size, 1)
    scaled = compute_rotary_frequencies(rope | {"rope_theta": theta}, size, 1)
    return rope if np.allclose(plain / factors, scaled, rtol=1e-5, atol=0) else None
