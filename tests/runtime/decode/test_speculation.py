"""Speculation: guesses change no bit of an answer, however it is drawn and whatever ends it, and stop where they do not pay."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgelora_runtime import Runtime, UsageError
from edgelora_runtime.bundle.draft_table import DraftTable
from edgelora_runtime.decode.drafter import Drafter, Guess
from edgelora_runtime.decode.speculation import Speculation
from edgelora_runtime.session.model import PREFILL_CHUNK, Model
from edgelora_runtime.session.step_costs import StepCosts
from tests.tiny import random_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgelora_runtime import Generation

VARIANTS = ("base", "linear", "plain-live")
MOST = 48  # tokens


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps seem to cost the same whatever they read, so that there is much guessing on any machine."""
    pretend_costs(monkeypatch, 1.0, 0.01)


def pretend_costs(monkeypatch: pytest.MonkeyPatch, none: float, each: float) -> None:
    """What a step without guesses seems to cost, and each guess, in steps of one row."""

    def estimate(costs: StepCosts, most: int, least_rows: int) -> list[float]:
        return [(costs.plain or 1.0) * (none + each * guesses) for guesses in range(most + 1)]

    monkeypatch.setattr(StepCosts, "estimate", estimate)


@pytest.fixture(scope="module", params=[32, 4])
def bundle(request: pytest.FixtureRequest, bundle32: Path, bundle4: Path) -> Path:
    return bundle32 if request.param == 32 else bundle4


@pytest.fixture
def opened(bundle: Path) -> Iterator[Runtime]:
    with Runtime(bundle, threads=1) as runtime:
        yield runtime


def generate_unguessed(bundle: Path, prompt: Any, **options: Any) -> Generation:
    """What a fresh runtime writes by steps of several rows, none of which is a guess."""
    with pytest.MonkeyPatch.context() as patch, Runtime(bundle, threads=1) as runtime:
        patch.setattr(Drafter, "guess", lambda drafter, most, least_chance=0.0: [])
        return runtime.generate(prompt, speculation="on", **options)


def know(monkeypatch: pytest.MonkeyPatch, *texts: list[int], wrong_at: int = 0) -> None:
    """Gives all variants a table of these texts; with wrong_at, of which each such token is another."""
    entries = {}
    for text in texts:
        for end in range(1, len(text)):
            token = (text[end] + 1) % 300 if wrong_at and end % wrong_at == 0 else text[end]
            entries[tuple(text[max(0, end - 3) : end])] = token, 1.0
    monkeypatch.setattr(Speculation, "_find_tables", lambda speculation, adapters: [DraftTable(entries)])


# --- the same answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_guesses_change_no_bit(bundle: Path, opened: Runtime, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and drawn, with guesses from the text and from a table that knows most of the answer."""
    options: dict[str, Any] = {"variant": variant, "max_tokens": MOST, "ignore_eos": True, "logprobs": 2}
    accepted = drafted = 0
    for seed in range(6):
        prompt = random_tokens(20, seed=seed) * 2
        drawn: dict[str, Any] = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.1}
        for sampling in ({}, drawn):
            expected = generate_unguessed(bundle, prompt, seed=seed, **options, **sampling)
            know(monkeypatch, [*prompt, *expected.tokens], wrong_at=7)
            found = opened.generate(prompt, seed=seed, speculation="on", **options, **sampling)
            assert found.tokens == expected.tokens
            assert found.text == expected.text
            assert found.logprobs == expected.logprobs, "not a bit of them"
            accepted += found.accepted_tokens
            drafted += found.drafted_tokens
    assert 12 * MOST / 2 < accepted < drafted


def test_answers_are_those_without_speculation(runtime: Runtime) -> None:
    """In float32, where kernels for one and for several rows differ by too little to change a likeliest token here."""
    for seed in range(10):
        prompt = random_tokens(20, seed=seed) * 2
        expected = runtime.generate(prompt, max_tokens=MOST, speculation="off")
        found = runtime.generate(prompt, max_tokens=MOST, speculation="on")
        assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
        assert expected.drafted_tokens == expected.accepted_tokens == 0


def test_draws_have_the_models_probabilities(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all answers of three tokens, against the product of what the model gives each, with the likeliest as a guess."""
    prompt, count, top_k, temperature = random_tokens(8), 1000, 3, 0.5
    likeliest = runtime.generate(prompt, max_tokens=3, ignore_eos=True).tokens
    know(monkeypatch, [*prompt, *likeliest])
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        grown = {}
        for answer, chance in expected.items():
            logits = runtime.logits([*prompt, *answer])[-1].astype(np.float64)
            tokens = np.argsort(-logits)[:top_k]
            weights = np.exp((logits[tokens] - logits[tokens[0]]) / temperature)
            for token, weight in zip(tokens.tolist(), weights / weights.sum(), strict=True):
                grown[*answer, token] = chance * weight
        expected = grown
    options: dict[str, Any] = {"max_tokens": 3, "temperature": temperature, "top_k": top_k, "ignore_eos": True}
    drawn = [runtime.generate(prompt, seed=seed, speculation="on", **options) for seed in range(count)]
    found = Counter(each.tokens for each in drawn)
    assert found.keys() <= expected.keys()
    assert 0 < sum(each.accepted_tokens for each in drawn) < sum(each.drafted_tokens for each in drawn)
    squares = sum((found[answer] - count * chance) ** 2 / (count * chance) for answer, chance in expected.items())
    freedom = len(expected) - 1
    assert squares < freedom + 4 * math.sqrt(2 * freedom)


# --- whatever ends or shapes them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"regex": "(the cat|a day)+"},
        {"regex": "[a-f]{20}", "temperature": 1.0},
        {"overflow": "slide", "max_tokens": 80},
        {"max_tokens": 2},
        {"max_tokens": 1},
    ],
    ids=["regex", "drawn regex", "slide", "two tokens", "one token"],
)
def test_other_options_hold_with_guesses(
    bundle: Path, opened: Runtime, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_tokens(1000 if "overflow" in options else 12)
    options = {"variant": "base", "seed": 3, "max_tokens": MOST, **options}
    expected = generate_unguessed(bundle, prompt, **options)
    know(monkeypatch, [*prompt, *expected.tokens], wrong_at=5)
    found = opened.generate(prompt, speculation="on", **options)
    assert found.tokens == expected.tokens
    assert (found.finish_reason, found.text) == (expected.finish_reason, expected.text)
    assert found.dropped_tokens == expected.dropped_tokens
    assert found.drafted_tokens > 0 or len(expected.tokens) < 3


def test_a_stop_string_and_pieces_come_as_without_guesses(bundle: Path, opened: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_tokens(12)
    whole = generate_unguessed(bundle, prompt, variant="base", max_tokens=MOST, ignore_eos=True)
    know(monkeypatch, [*prompt, *whole.tokens])
    stop = whole.text[len(whole.text) // 2 :][:3]
    stream = opened.stream(prompt, variant="base", max_tokens=MOST, ignore_eos=True, stop=[stop], speculation="on")
    pieces = list(stream)
    assert stream.generation is not None
    assert stream.generation.accepted_tokens > 0
    assert "".join(pieces) == whole.text[: whole.text.index(stop)] == stream.generation.text
    assert len(pieces) > 3, "a token's text does not wait for the next step"


def test_cached_prompts_hold_what_was_written_alone(bundle: Path, opened: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request ends among guesses that were read; the next goes on from its last token, and as from an empty cache."""
    prompt = random_tokens(12)
    options: dict[str, Any] = {"variant": "base", "ignore_eos": True}
    whole = generate_unguessed(bundle, prompt, max_tokens=MOST, **options)
    know(monkeypatch, [*prompt, *whole.tokens])
    stream = opened.stream(prompt, max_tokens=MOST, speculation="on", **options)
    for _ in range(7):
        next(stream)
    stream.close()
    text = [*prompt, *whole.tokens]
    held = opened.generate([*text[:40], 5, 6], max_tokens=8, speculation="on", **options)
    assert 12 < held.reused_tokens < 40
    assert held.tokens == generate_unguessed(bundle, [*text[:40], 5, 6], max_tokens=8, **options).tokens


def test_a_request_is_cancelled_among_guesses(opened: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_tokens(12)
    options: dict[str, Any] = {"variant": "base", "max_tokens": MOST, "ignore_eos": True, "speculation": "on"}
    whole = opened.generate(prompt, **options)
    know(monkeypatch, [*prompt, *whole.tokens])
    stream = opened.stream(prompt, **options)
    next(stream)
    stream.cancel()
    for _ in stream:
        pass
    assert stream.generation is not None
    assert stream.generation.finish_reason == "cancelled"
    assert stream.generation.tokens == whole.tokens[: len(stream.generation.tokens)]
    assert len(stream.generation.tokens) <= 1 + 9


# --- where it pays --------------------------------------------------------------------------------------------------------


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each later step, as they come."""
    read, rows = Model.read, []

    def note(model: Model, cache: Any, tokens: Any, **rest: Any) -> Any:
        rows.append(len(tokens))
        return read(model, cache, tokens, **rest)

    monkeypatch.setattr(Model, "read", note)
    return rows


def test_right_guesses_save_steps(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_tokens(12)
    whole = runtime.generate(prompt, max_tokens=41, ignore_eos=True)
    know(monkeypatch, [*prompt, *whole.tokens])
    rows = count_rows(monkeypatch)
    found = runtime.generate(prompt, max_tokens=41, ignore_eos=True, speculation="on")
    assert found.tokens == whole.tokens
    assert found.accepted_tokens == found.drafted_tokens
    assert len(rows) == 1 + 40 - found.accepted_tokens < 10


def test_no_step_of_a_speculating_request_has_one_row(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drafter, "guess", lambda drafter, most, least_chance=0.0: [])
    rows = count_rows(monkeypatch)
    runtime.generate(random_tokens(12), max_tokens=10, ignore_eos=True, speculation="on")
    assert rows == [12] + [2] * 9


def test_auto_has_steps_of_one_row_where_nothing_is_guessed(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.generate(random_tokens(12), max_tokens=2, ignore_eos=True)  # measures what one costs
    monkeypatch.setattr(Drafter, "guess", lambda drafter, most, least_chance=0.0: [])
    rows = count_rows(monkeypatch)
    runtime.generate(random_tokens(12, seed=8), max_tokens=10, ignore_eos=True, speculation="auto")
    assert rows == [12] + [1] * 9


@pytest.mark.parametrize(("length", "guesses"), [(PREFILL_CHUNK - 3, 3), (PREFILL_CHUNK, 0), (PREFILL_CHUNK + 1, 8)])
def test_guesses_behind_a_prompt_stay_in_its_last_chunk(
    bundle: Path, opened: Runtime, length: int, guesses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_tokens(length)
    options: dict[str, Any] = {"variant": "base", "max_tokens": 20, "ignore_eos": True, "logprobs": 1}
    expected = generate_unguessed(bundle, prompt, **options)
    know(monkeypatch, [*prompt, *expected.tokens])
    rows = count_rows(monkeypatch)
    found = opened.generate(prompt, speculation="on", **options)
    assert rows[0] == length + guesses
    assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)


def test_unlikely_guesses_are_not_read_behind_a_prompt(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_costs(monkeypatch, 1.0, 0.5)
    guesses = [Guess(7, 0, chance) for chance in (0.9, 0.7, 0.7, 0.9)]
    monkeypatch.setattr(Drafter, "guess", lambda drafter, most, least_chance=0.0: guesses[:most])
    rows = count_rows(monkeypatch)
    runtime.generate(random_tokens(12, seed=9), max_tokens=10, ignore_eos=True, speculation="on")
    assert rows[0] == 12 + 2, "0.9 and 0.63 of them save a step, at half a step each; 0.44 do not"


def test_auto_gives_up_where_guesses_fail(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses that are always wrong: after some requests nearly all have steps of one row, and few try again."""
    monkeypatch.undo()
    wrong = itertools.count()
    monkeypatch.setattr(Drafter, "guess", lambda drafter, most, least_chance=0.0: [Guess(next(wrong) % 300, 0, 0.5)][:most])
    pretend_costs(monkeypatch, 1.2, 0.4)
    tried = [
        runtime.generate(random_tokens(12, seed=seed), max_tokens=40, ignore_eos=True, speculation="auto").drafted_tokens > 0
        for seed in range(50)
    ]
    assert not tried[0], "a step of one row is measured first"
    assert tried[1]
    assert sum(tried[5:]) <= 4


def test_auto_goes_on_where_guesses_come_true(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_tokens(12)
    whole = runtime.generate(prompt, max_tokens=40, ignore_eos=True)
    know(monkeypatch, [*prompt, *whole.tokens])
    pretend_costs(monkeypatch, 1.2, 0.1)
    found = [runtime.generate(prompt, max_tokens=40, ignore_eos=True, speculation="auto") for _ in range(30)]
    assert all(each.tokens == whole.tokens for each in found)
    assert sum(each.accepted_tokens > 0 for each in found) >= 27


def test_an_unknown_mode_is_refused(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="speculation 'maybe' is not supported; use one of auto, on, off"):
        runtime.stream([1], speculation="maybe")
