"""Penalties, biases and processors: against OpenAI's formula in float64, and against transformers' own processors."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from edgelora_runtime import UsageError
from edgelora_runtime.decode.adjustment import Adjustment, LogitChanges
from tests.tiny import load_base, torch_logits

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora_runtime import Runtime

LOGITS = hnp.arrays(np.float32, 30, elements=st.floats(-30, 30, width=16))
TOKENS = st.lists(st.integers(0, 29), max_size=20)
PENALTY = st.floats(-2, 2)
PROMPT = [5, 9, 4]


def change(**options: Any) -> LogitChanges:
    plain = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "biases": (), "processors": ()}
    return LogitChanges(**{**plain, **options})


def adjust(logits: NDArray[np.float32], prompt: list[int], written: list[int], **options: Any) -> NDArray[np.float32]:
    adjustment = Adjustment(change(**options), prompt)
    for token in written:
        adjustment.append(token)
    before = logits.copy()
    adjusted = adjustment.apply(logits)
    np.testing.assert_array_equal(logits, before)
    return adjusted


@given(LOGITS, TOKENS, TOKENS, PENALTY, PENALTY)
@settings(deadline=None)
def test_penalties_are_openais_formula(
    logits: NDArray[np.float32], prompt: list[int], written: list[int], presence: float, frequency: float
) -> None:
    """mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, c counting the sampled tokens."""
    counts = Counter(written)
    expected = [float(mu) - counts[j] * frequency - float(counts[j] > 0) * presence for j, mu in enumerate(logits)]
    found = adjust(logits, prompt, written, presence_penalty=presence, frequency_penalty=frequency)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


@given(LOGITS, st.dictionaries(st.integers(0, 29), st.floats(-100, 100).filter(bool), min_size=1, max_size=9))
@settings(deadline=None)
def test_biases_are_transformers(logits: NDArray[np.float32], biases: dict[int, float]) -> None:
    any_processor: Any = SequenceBiasLogitsProcessor
    processor = any_processor({(token,): bias for token, bias in biases.items()})
    theirs = processor(torch.tensor([[0]]), torch.from_numpy(logits.copy())[None])[0].numpy()
    np.testing.assert_allclose(adjust(logits, [], [], biases=tuple(biases.items())), theirs, rtol=1e-6, atol=1e-5)


@given(LOGITS, TOKENS, TOKENS, st.floats(0.5, 2), PENALTY, st.integers(0, 29), st.floats(-100, 100))
@settings(deadline=None)
def test_changes_are_made_in_the_documented_order(
    logits: NDArray[np.float32],
    prompt: list[int],
    written: list[int],
    repetition: float,
    frequency: float,
    biased: int,
    bias: float,
) -> None:
    processor: Any = RepetitionPenaltyLogitsProcessor(repetition)
    ids = torch.tensor([prompt + written], dtype=torch.long)
    expected = processor(ids, torch.from_numpy(logits.astype(np.float64))[None])[0].numpy()
    for token, count in Counter(written).items():
        expected[token] -= count * frequency
    expected[biased] += bias
    options = {"repetition_penalty": repetition, "frequency_penalty": frequency, "biases": ((biased, bias),)}
    seen: list[Any] = []

    def see(tokens: list[int], given: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append((tokens, given.copy()))
        return given * 2

    found = adjust(logits, prompt, written, processors=(see,), **options)
    ((tokens, given),) = seen
    assert tokens == prompt + written
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(found, given * 2)


def write_by_hand(base: Path, count: int, adjusted: Any) -> list[int]:
    """Greedy tokens from transformers' logits, changed by a function of (answer so far, float64 logits)."""
    model = load_base(base)
    written: list[int] = []
    while len(written) < count:
        logits = torch_logits(model, [*PROMPT, *written])[-1].astype(np.float64)
        written.append(int(adjusted(written, logits).argmax()))
    return written


def test_penalized_answers_are_those_of_the_formula(runtime: Runtime, tiny_base: Path) -> None:
    def penalize(written: list[int], logits: NDArray[np.float64]) -> NDArray[np.float64]:
        counts = np.bincount(written, minlength=logits.size)
        penalized: NDArray[np.float64] = logits - counts * 1.5 - (counts > 0) * 0.75
        return penalized

    options: Any = {"variant": "base", "max_tokens": 30, "ignore_eos": True}
    found = runtime.generate(PROMPT, presence_penalty=0.75, frequency_penalty=1.5, **options)
    assert list(found.tokens) == write_by_hand(tiny_base, 30, penalize)
    assert found.tokens != runtime.generate(PROMPT, **options).tokens


def test_transformers_processors_work_as_ours(runtime: Runtime, tiny_base: Path) -> None:
    first = runtime.generate(PROMPT, variant="base", max_tokens=3).tokens
    theirs: Any = NoBadWordsLogitsProcessor([[first[0]], [first[1]]], eos_token_id=torch.tensor([1]))

    def process(tokens: list[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        changed: NDArray[np.float32] = theirs(torch.tensor([tokens]), torch.from_numpy(logits)[None])[0].numpy()
        return changed

    def ban(written: list[int], logits: NDArray[np.float64]) -> NDArray[np.float64]:
        logits[list(first[:2])] = -np.inf
        return logits

    options: Any = {"variant": "base", "max_tokens": 12, "ignore_eos": True}
    expected = write_by_hand(tiny_base, 12, ban)
    assert list(runtime.generate(PROMPT, logits_processors=[process], **options).tokens) == expected
    assert list(runtime.generate(PROMPT, logit_bias={first[0]: -100, first[1]: -100.0}, **options).tokens) == expected


def test_a_bias_by_text_is_one_by_its_token(runtime: Runtime) -> None:
    (token,) = runtime.tokenizer.encode("at", special_tokens=False)
    by_text = runtime.generate(PROMPT, logit_bias={"at": 100}, max_tokens=4)
    assert by_text.tokens == runtime.generate(PROMPT, logit_bias={np.int64(token): 100.0}, max_tokens=4).tokens == (token,) * 4  # type: ignore[dict-item]


def test_log_probabilities_stay_those_of_the_model(runtime: Runtime) -> None:
    plain = runtime.generate(PROMPT, max_tokens=1, logprobs=3)
    biased = runtime.generate(PROMPT, max_tokens=1, logprobs=3, logit_bias={7: 100})
    assert biased.tokens == (7,)
    assert [token for token, _ in biased.logprobs[0].top] == [token for token, _ in plain.logprobs[0].top]
    expected = [value for _, value in plain.logprobs[0].top]
    assert [value for _, value in biased.logprobs[0].top] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "options", [{"presence_penalty": 1.0, "frequency_penalty": 0.5}, {"logit_bias": {9: 3.0}}, {"repetition_penalty": 1.3}]
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_speculation_stays_exact(runtime: Runtime, options: Any, temperature: float) -> None:
    """In float32 on tiny logits, steps of several rows draw what steps of one row draw."""
    prompt = PROMPT * 6
    request: Any = {"variant": "base", "max_tokens": 60, "temperature": temperature, "seed": 3, "ignore_eos": True, **options}
    drafted = runtime.generate(prompt, speculation="on", **request)
    assert drafted.drafted_tokens
    assert drafted.tokens == runtime.generate(prompt, **request).tokens


def test_a_constraint_masks_what_processors_return(runtime: Runtime) -> None:
    def allow_all(tokens: list[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.zeros_like(logits)

    assert set(runtime.generate("the", regex="a{5}", logits_processors=[allow_all], max_tokens=9).text) == {"a"}


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (lambda tokens, logits: None, "returned NoneType"),
    "a list": (lambda tokens, logits: logits.tolist(), "returned list"),
    "another shape": (lambda tokens, logits: logits[:-1], r"returned float32 \(299,\)"),
    "whole numbers": (lambda tokens, logits: logits.astype(np.int64), "returned int64"),
    "NaN": (lambda tokens, logits: logits * np.nan, "returned logits whose largest is nan"),
    "nothing to draw": (lambda tokens, logits: logits - np.inf, "returned logits whose largest is -inf"),
}


@pytest.mark.parametrize(("processor", "reason"), WRONG.values(), ids=WRONG.keys())
def test_what_a_processor_returns_is_checked(runtime: Runtime, processor: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=rf"logits_processors\[1\] {reason}"):
        runtime.generate(PROMPT, logits_processors=[lambda tokens, logits: logits, processor])
    assert runtime.generate(PROMPT, max_tokens=2).tokens, "the runtime goes on"


@pytest.mark.parametrize(
    ("biases", "reason"),
    [
        ({300: 1}, "token 300 is outside the vocabulary of 300"),
        ({"zq zq": 1}, "'zq zq' is [0-9]+ tokens .*not one"),
        ({-1: 1}, "use token ids or texts"),
        ({"": 1}, "use token ids or texts"),
        ({5: 101}, "from -100 to 100"),
        ({5: "much"}, "from -100 to 100"),
        ({True: 1}, "use token ids or texts"),
        ([5], "use token ids or texts"),
    ],
)
def test_biases_that_cannot_be_used_are_refused(runtime: Runtime, biases: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=f"logit_bias.*{reason}"):
        runtime.stream(PROMPT, logit_bias=biases)


def test_a_token_has_one_bias(runtime: Runtime) -> None:
    (token,) = runtime.tokenizer.encode("at", special_tokens=False)
    with pytest.raises(UsageError, match=f"'at' is token {token}, which has a bias already"):
        runtime.stream(PROMPT, logit_bias={token: 1, "at": 2})
