"""Speculation: draft tokens change no bit of an answer, however it is drawn or ends, and drafting stops where it does not pay."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgelora_runtime import Runtime
from edgelora_runtime.bundle.draft_table import DraftTable
from edgelora_runtime.decode import reader
from edgelora_runtime.decode.drafter import Drafter, DraftToken
from edgelora_runtime.decode.speculation import DraftTables, Speculation
from edgelora_runtime.session.model import PREFILL_CHUNK, Model
from tests.tiny import random_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from edgelora_runtime import Generation
    from edgelora_runtime.decode.reader import EstimateCosts
    from edgelora_runtime.session.step_costs import StepCosts

VARIANTS = ("base", "linear", "plain-live")
MOST = 48  # tokens


class KnownTables(DraftTables):
    """One table for all variants, made from some texts. wrong_at: every such token of a text is replaced by another."""

    def __init__(self, texts: Sequence[Sequence[int]], wrong_at: int = 0) -> None:
        entries = {}
        for text in texts:
            for end in range(1, len(text)):
                token = (text[end] + 1) % 300 if wrong_at and end % wrong_at == 0 else text[end]
                entries[tuple(text[max(0, end - 3) : end])] = token, 1.0
        self._table = DraftTable(entries)

    def load(self, adapters: Sequence[str], vocab_size: int) -> list[DraftTable]:
        return [self._table]

    def clear(self) -> None:
        pass


class ScriptedDrafter(Drafter):
    """Proposes what a function of the number of draft tokens returns."""

    def __init__(self, propose: Callable[[int], list[DraftToken]], *rest: Any) -> None:
        super().__init__(*rest)
        self._script = propose

    def propose(self, limit: int, min_rate: float = 0.0) -> list[DraftToken]:
        return self._script(limit)


def assume_costs(plain: float, each: float) -> EstimateCosts:
    """Pretends that a step without draft tokens costs `plain`, and each draft token `each`, in steps of one row."""

    def estimate(costs: StepCosts, limit: int, min_rows: int) -> list[float]:
        return [(costs.plain or 1.0) * (plain + each * count) for count in range(limit + 1)]

    return estimate


CHEAP = assume_costs(1.0, 0.01)  # so cheap that there is much drafting on any machine


def speculate(
    runtime: Runtime,
    *texts: Sequence[int],
    wrong_at: int = 0,
    estimate: EstimateCosts = CHEAP,
    propose: Callable[[int], list[DraftToken]] | None = None,
) -> None:
    """Lets a runtime draft from known texts, or from a script, at assumed costs."""
    runtime._speculation = Speculation(
        runtime.bundle,
        tables=KnownTables(texts, wrong_at) if texts else None,
        make_drafter=Drafter if propose is None else partial(ScriptedDrafter, propose),
        estimate=estimate,
    )


def propose_nothing(limit: int) -> list[DraftToken]:
    return []


@pytest.fixture(scope="module", params=[32, 4])
def bundle(request: pytest.FixtureRequest, bundle32: Path, bundle4: Path) -> Path:
    return bundle32 if request.param == 32 else bundle4


@pytest.fixture
def opened(bundle: Path) -> Iterator[Runtime]:
    with Runtime(bundle, threads=1) as runtime:
        speculate(runtime)
        yield runtime


@pytest.fixture
def runtime(runtime: Runtime) -> Runtime:
    speculate(runtime)
    return runtime


def generate_undrafted(bundle: Path, prompt: Any, **options: Any) -> Generation:
    """What a fresh runtime writes by steps of several rows without draft tokens."""
    with Runtime(bundle, threads=1) as runtime:
        speculate(runtime, propose=propose_nothing)
        return runtime.generate(prompt, speculation="on", **options)


# --- the same answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_draft_tokens_change_no_bit(bundle: Path, opened: Runtime, variant: str) -> None:
    """Greedy and drawn, with draft tokens from the text and from a table that knows most of the answer."""
    options: dict[str, Any] = {"variant": variant, "max_tokens": MOST, "ignore_eos": True, "logprobs": 2}
    accepted = drafted = 0
    for seed in range(6):
        prompt = random_tokens(20, seed=seed) * 2
        drawn: dict[str, Any] = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.1}
        for sampling in ({}, drawn):
            expected = generate_undrafted(bundle, prompt, seed=seed, **options, **sampling)
            speculate(opened, [*prompt, *expected.tokens], wrong_at=7)
            found = opened.generate(prompt, seed=seed, speculation="on", **options, **sampling)
            assert found.tokens == expected.tokens
            assert found.text == expected.text
            assert found.logprobs == expected.logprobs, "equal to the last bit"
            accepted += found.accepted_tokens
            drafted += found.drafted_tokens
    assert 12 * MOST / 2 < accepted < drafted


def test_answers_are_those_without_speculation(runtime: Runtime) -> None:
    """In float32: here, kernels for one row and for several differ too little to change a likeliest token."""
    for seed in range(10):
        prompt = random_tokens(20, seed=seed) * 2
        expected = runtime.generate(prompt, max_tokens=MOST, speculation="off")
        found = runtime.generate(prompt, max_tokens=MOST, speculation="on")
        assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
        assert expected.drafted_tokens == expected.accepted_tokens == 0


def test_draws_have_the_models_probabilities(runtime: Runtime) -> None:
    """All answers of three tokens come as often as the model's probabilities say, though the likeliest one is always drafted."""
    prompt, count, top_k, temperature = random_tokens(8), 1000, 3, 0.5
    likeliest = runtime.generate(prompt, max_tokens=3, ignore_eos=True).tokens
    speculate(runtime, [*prompt, *likeliest])
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


# --- with other options -----------------------------------------------------------------------------------------


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
def test_other_options_hold_with_draft_tokens(bundle: Path, opened: Runtime, options: dict[str, Any]) -> None:
    prompt = random_tokens(1000 if "overflow" in options else 12)
    options = {"variant": "base", "seed": 3, "max_tokens": MOST, **options}
    expected = generate_undrafted(bundle, prompt, **options)
    speculate(opened, [*prompt, *expected.tokens], wrong_at=5)
    found = opened.generate(prompt, speculation="on", **options)
    assert found.tokens == expected.tokens
    assert (found.finish_reason, found.text) == (expected.finish_reason, expected.text)
    assert found.dropped_tokens == expected.dropped_tokens
    assert found.drafted_tokens > 0 or len(expected.tokens) < 3


def test_stop_strings_and_pieces_come_as_without_draft_tokens(bundle: Path, opened: Runtime) -> None:
    prompt = random_tokens(12)
    whole = generate_undrafted(bundle, prompt, variant="base", max_tokens=MOST, ignore_eos=True)
    speculate(opened, [*prompt, *whole.tokens])
    stop = whole.text[len(whole.text) // 2 :][:3]
    stream = opened.stream(prompt, variant="base", max_tokens=MOST, ignore_eos=True, stop=[stop], speculation="on")
    pieces = list(stream)
    assert stream.generation is not None
    assert stream.generation.accepted_tokens > 0
    assert "".join(pieces) == whole.text[: whole.text.index(stop)] == stream.generation.text
    assert len(pieces) > 3, "a token's text does not wait for the next step"


def test_cached_prompts_hold_only_what_was_written(bundle: Path, opened: Runtime) -> None:
    """A request ends among draft tokens that were read; the next one continues from its last token, as from an empty cache."""
    prompt = random_tokens(12)
    options: dict[str, Any] = {"variant": "base", "ignore_eos": True}
    whole = generate_undrafted(bundle, prompt, max_tokens=MOST, **options)
    speculate(opened, [*prompt, *whole.tokens])
    stream = opened.stream(prompt, max_tokens=MOST, speculation="on", **options)
    for _ in range(7):
        next(stream)
    stream.close()
    text = [*prompt, *whole.tokens]
    held = opened.generate([*text[:40], 5, 6], max_tokens=8, speculation="on", **options)
    assert 12 < held.reused_tokens < 40
    assert held.tokens == generate_undrafted(bundle, [*text[:40], 5, 6], max_tokens=8, **options).tokens


def test_a_request_is_cancelled_among_draft_tokens(opened: Runtime) -> None:
    prompt = random_tokens(12)
    options: dict[str, Any] = {"variant": "base", "max_tokens": MOST, "ignore_eos": True, "speculation": "on"}
    whole = opened.generate(prompt, **options)
    speculate(opened, [*prompt, *whole.tokens])
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
    """A list that receives the rows of each later step."""
    read, rows = Model.read, []

    def record(model: Model, cache: Any, tokens: Any, **rest: Any) -> Any:
        rows.append(len(tokens))
        return read(model, cache, tokens, **rest)

    monkeypatch.setattr(Model, "read", record)
    return rows


def test_accepted_draft_tokens_save_steps(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_tokens(12)
    whole = runtime.generate(prompt, max_tokens=41, ignore_eos=True)
    speculate(runtime, [*prompt, *whole.tokens])
    rows = count_rows(monkeypatch)
    found = runtime.generate(prompt, max_tokens=41, ignore_eos=True, speculation="on")
    assert found.tokens == whole.tokens
    assert found.accepted_tokens == found.drafted_tokens
    assert len(rows) == 1 + 40 - found.accepted_tokens < 10


def test_no_step_of_a_speculating_request_has_one_row(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    speculate(runtime, propose=propose_nothing)
    rows = count_rows(monkeypatch)
    runtime.generate(random_tokens(12), max_tokens=10, ignore_eos=True, speculation="on")
    assert rows == [12] + [2] * 9


def test_auto_takes_steps_of_one_row_without_draft_tokens(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.generate(random_tokens(12), max_tokens=2, ignore_eos=True)  # measures a step of one row
    speculate(runtime, propose=propose_nothing)
    rows = count_rows(monkeypatch)
    runtime.generate(random_tokens(12, seed=8), max_tokens=10, ignore_eos=True, speculation="auto")
    assert rows == [12] + [1] * 9


@pytest.mark.parametrize(("length", "drafted"), [(PREFILL_CHUNK - 3, 3), (PREFILL_CHUNK, 0), (PREFILL_CHUNK + 1, 8)])
def test_draft_tokens_after_a_prompt_stay_in_its_last_chunk(
    bundle: Path, opened: Runtime, length: int, drafted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_tokens(length)
    options: dict[str, Any] = {"variant": "base", "max_tokens": 20, "ignore_eos": True, "logprobs": 1}
    expected = generate_undrafted(bundle, prompt, **options)
    speculate(opened, [*prompt, *expected.tokens])
    rows = count_rows(monkeypatch)
    found = opened.generate(prompt, speculation="on", **options)
    assert rows[0] == length + drafted
    assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)


def test_unlikely_draft_tokens_are_not_read_after_a_prompt(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts = [DraftToken(7, 0, rate) for rate in (0.9, 0.7, 0.7, 0.9)]
    speculate(runtime, estimate=assume_costs(1.0, 0.5), propose=lambda limit: drafts[:limit])
    rows = count_rows(monkeypatch)
    runtime.generate(random_tokens(12, seed=9), max_tokens=10, ignore_eos=True, speculation="on")
    assert rows[0] == 12 + 2, "rates of 0.9 and 0.63 pay for half a step each, 0.44 does not"


@pytest.fixture
def free_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes drafting itself cost no time, so that the assumed costs of steps decide alone, however busy the machine is."""
    monkeypatch.setattr(reader, "time", SimpleNamespace(perf_counter=lambda: 0.0))


@pytest.mark.usefixtures("free_drafting")
def test_auto_gives_up_where_draft_tokens_are_rejected(runtime: Runtime) -> None:
    """Draft tokens that are always wrong: after some requests, nearly all take steps of one row, and few try again."""
    wrong = itertools.count()
    costs = assume_costs(1.2, 0.4)
    speculate(runtime, estimate=costs, propose=lambda limit: [DraftToken(next(wrong) % 300, 0, 0.5)][:limit])
    tried = [
        runtime.generate(random_tokens(12, seed=seed), max_tokens=40, ignore_eos=True, speculation="auto").drafted_tokens > 0
        for seed in range(50)
    ]
    assert not tried[0], "a step of one row is measured first"
    assert tried[1]
    assert sum(tried[5:]) <= 4


@pytest.mark.usefixtures("free_drafting")
def test_auto_goes_on_where_draft_tokens_are_accepted(runtime: Runtime) -> None:
    prompt = random_tokens(12)
    whole = runtime.generate(prompt, max_tokens=40, ignore_eos=True)
    speculate(runtime, [*prompt, *whole.tokens], estimate=assume_costs(1.2, 0.1))
    found = [runtime.generate(prompt, max_tokens=40, ignore_eos=True, speculation="auto") for _ in range(30)]
    assert all(each.tokens == whole.tokens for each in found)
    assert sum(each.accepted_tokens > 0 for each in found) >= 27
