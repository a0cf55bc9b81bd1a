"""Bootstrap intervals against scipy's, and scores of answers by hand."""

from __future__ import annotations

import numpy as np
import pytest

from edgelora.data.intervals import bootstrap_interval
from edgelora.data.scores import compile_pattern, match_found, rouge_l
from edgelora_runtime.errors import InputError


def test_intervals_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(1)
    counts = generator.integers(1, 30, 400)
    nats = counts * generator.gamma(2.0, 1.0, 400)
    found = bootstrap_interval([*zip(nats.tolist(), counts.tolist(), strict=True)])
    reference = stats.bootstrap(
        (nats, counts), lambda one, other, axis: one.sum(axis) / other.sum(axis), paired=True, n_resamples=4000,
        method="percentile", rng=generator,
    ).confidence_interval  # fmt: skip
    width = reference.high - reference.low
    assert found == pytest.approx((reference.low, reference.high), abs=0.08 * width)
    assert found == bootstrap_interval([*zip(nats.tolist(), counts.tolist(), strict=True)]), "the same each time"


def test_intervals_of_all_and_of_nothing() -> None:
    assert bootstrap_interval([(1, 1)] * 5) == (1.0, 1.0)
    assert bootstrap_interval([(0, 2), (3, 0), (0, 1)])[0] == 0.0
    assert bootstrap_interval([(2, 4)]) == (0.5, 0.5)


def test_rouge_l_by_hand() -> None:
    """The longest common subsequence: "the cat sat" of 3 and 4 words, F = 2 · 1 · 3/4 / (1 + 3/4)."""
    pytest.importorskip("rouge_score")
    assert rouge_l(["the cat sat", "", "moon"], ["the cat sat down", "a", "sun"]) == pytest.approx([6 / 7, 0, 0])


def test_patterns_find_what_counts() -> None:
    pattern = compile_pattern(r"####\s*(-?\d+)")
    right = ["so #### 42", "so ####  7", "#### -3"]
    assert match_found(["I think #### 42.", "7", "#### 3"], right, pattern) == [True, False, False]
    assert match_found(["yes indeed"], ["yes"], compile_pattern("yes|no")) == [True]
    with pytest.raises(InputError, match=r"rows line 2: the right answer has no match for --regex"):
        match_found(["a", "b"], ["#### 1", "1"], pattern, ["rows line 1", "rows line 2"])
