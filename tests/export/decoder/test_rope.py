"""Rotary tables are those of transformers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from edgelora_export.decoder.rope import (
    compute_attention_factor,
    compute_query_scales,
    compute_rotary_frequencies,
    compute_rotary_tables,
    read_rope,
)
from edgelora_runtime.errors import InputError

LONGEST = 4096
ORIGINAL = "original_max_position_embeddings"


def compute_theirs(rope: dict[str, Any], head_size: int, **settings: Any) -> tuple[Any, float]:
    """The frequencies and the attention factor of transformers for a Llama with these rope settings."""
    sizes: dict[str, Any] = {"hidden_size": 2 * head_size, "num_attention_heads": 2, "head_dim": head_size}
    config = LlamaConfig(**sizes, max_position_embeddings=LONGEST, rope_parameters=dict(rope), **settings)
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return frequencies.numpy(), factor


OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "attention_factor": st.floats(0.1, 3.0),
    "beta_fast": st.floats(2.5, 64.0),
    "beta_slow": st.floats(0.25, 2.0),
    "mscale": st.floats(0.0, 2.0),
    "mscale_all_dim": st.floats(0.0, 2.0),
    "truncate": st.booleans(),
    ORIGINAL: st.integers(16, LONGEST),
}


@given(
    head_size=st.sampled_from([16, 64, 128]),
    theta=st.floats(100.0, 1e6),
    factor=st.floats(0.5, 64.0) | st.none(),
    options=st.fixed_dictionaries({}, optional=OPTIONS),
)
def test_yarn_is_that_of_transformers(head_size: int, theta: float, factor: float | None, options: dict[str, Any]) -> None:
    settings = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, **options}
    expected, expected_factor = compute_theirs(settings, head_size)
    rope = read_rope({"rope_parameters": settings, "max_position_embeddings": LONGEST})
    np.testing.assert_allclose(compute_rotary_frequencies(rope, head_size, LONGEST), expected, rtol=2e-6, atol=0)
    assert compute_attention_factor(rope) == pytest.approx(expected_factor, rel=1e-12)


def test_yarns_tables_carry_the_attention_factor() -> None:
    rope = read_rope({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64}, "max_position_embeddings": 256})
    cos, sin = compute_rotary_tables(rope, 32, 256, 32)
    np.testing.assert_allclose(cos**2 + sin**2, (0.1 * math.log(4.0) + 1) ** 2, rtol=1e-6)


@pytest.mark.parametrize("place", ["config", "rope"])
def test_the_original_context_of_the_config_wins(place: str) -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, **({ORIGINAL: 512} if place == "rope" else {})}
    outside = {ORIGINAL: 256} if place == "config" else {}
    expected, _ = compute_theirs(rope, 64, **outside)
    read = read_rope({"rope_parameters": rope, "max_position_embeddings": LONGEST, **outside})
    np.testing.assert_allclose(compute_rotary_frequencies(read, 64, LONGEST), expected, rtol=2e-6)


@given(beta=st.floats(0.01, 2.0), original=st.integers(1, 300), context=st.integers(1, 900))
def test_query_scales_are_those_of_ministral(beta: float, original: int, context: int) -> None:
    rope = {"llama_4_scaling_beta": beta, ORIGINAL: original}
    expected = get_llama_4_attn_scale(torch.arange(context)[None], beta, original)[0, 0].numpy()
    found = compute_query_scales(rope, context)
    if context <= original:
        assert found is None
        assert (expected == 1).all()
    else:
        assert found is not None
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_yarn_without_a_factor_is_refused() -> None:
    with pytest.raises(InputError, match="yarn and lack factor"):
        read_rope({"rope_parameters": {"rope_type": "yarn"}, "max_position_embeddings": 64})
