"""Guesses come from the text and from tables as they should, tables survive their file, and lengths are the best there are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from edgelora_runtime import IntegrityError
from edgelora_runtime.bundle.draft_table import LONGEST_CONTEXT, MOST_ENTRIES, DraftTable
from edgelora_runtime.decode.drafter import Drafter, Experience
from edgelora_runtime.session.step_costs import MOST_GUESSES, StepCosts, choose_length, find_least_chance

VOCABULARY = 300
TEXTS = st.lists(st.integers(0, 4), min_size=1, max_size=40)
TOKENS = st.integers(0, VOCABULARY - 1)
CONTEXTS = st.lists(TOKENS, min_size=1, max_size=LONGEST_CONTEXT).map(tuple)
TABLES = st.dictionaries(CONTEXTS, st.tuples(TOKENS, st.integers(0, 255).map(lambda share: share / 255)), max_size=20)


def make_drafter(text: list[int], table: DraftTable | None = None, end_tokens: tuple[int, ...] = ()) -> Drafter:
    return Drafter(text, [table] if table is not None else [], Experience(), end_tokens)


# --- from the text --------------------------------------------------------------------------------------------------------


def follow_latest(text: list[int]) -> int | None:
    """The token behind the latest other place where the last 3, 2 or 1 tokens stand."""
    for length in (3, 2, 1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[-length:]:
                return text[end]
    return None


@given(TEXTS, TEXTS)
def test_guesses_follow_the_latest_and_longest_match(text: list[int], more: list[int]) -> None:
    drafter = make_drafter(text)
    for token in more:
        drafter.append(token)
    guesses = [guess.token for guess in drafter.guess(1)]
    expected = follow_latest(text + more)
    assert guesses == ([] if expected is None else [expected])


def test_a_repeated_text_is_guessed_on_and_on() -> None:
    drafter = make_drafter([7, 8, 9, 7, 8, 9, 7])
    assert [guess.token for guess in drafter.guess(5)] == [8, 9, 7, 8, 9]


@given(TEXTS, st.integers(0, 4))
def test_no_end_token_is_guessed(text: list[int], end_token: int) -> None:
    assert end_token not in [guess.token for guess in make_drafter(text, end_tokens=(end_token,)).guess(MOST_GUESSES)]


def test_unlikely_guesses_are_not_looked_up_beyond_the_first() -> None:
    assert len(make_drafter([1, 2, 3] * 4).guess(8, least_chance=1.0)) == 1


# --- from tables ----------------------------------------------------------------------------------------------------------


@given(TABLES)
def test_a_table_survives_its_file(entries: dict[tuple[int, ...], tuple[int, float]]) -> None:
    read = DraftTable.read(DraftTable(entries).dump(), "x", VOCABULARY)
    assert len(read) == len(entries)
    for context, (token, share) in entries.items():
        found = read.find(context)
        assert found is not None
        assert found[0] == token
        assert found[1] == pytest.approx(share)


def test_the_longest_context_decides() -> None:
    table = DraftTable({(1,): (5, 0.9), (2, 1): (6, 0.1)})
    assert table.find([2, 1]) == (6, 0.1)
    assert table.find([3, 1]) == (5, 0.9)
    assert table.find([3]) is None


def test_the_likelier_of_text_and_table_is_guessed() -> None:
    text = [1, 2, 3, 1]  # what followed 1 was 2
    assert [guess.token for guess in make_drafter(text, DraftTable({(1,): (9, 1.0)})).guess(1)] == [9]
    assert [guess.token for guess in make_drafter(text, DraftTable({(1,): (9, 0.01)})).guess(1)] == [2]


def test_experience_changes_who_is_believed() -> None:
    experience, table = Experience(), DraftTable({(1,): (9, 1.0)})
    for _ in range(200):
        experience.learn(experience.guess_from_table(9, 1.0, agrees=False), 2)
    assert [guess.token for guess in Drafter([1, 2, 3, 1], [table], experience).guess(1)] == [2]


def test_a_guess_of_text_and_table_alike_is_likelier_and_rated_apart() -> None:
    experience, table = Experience(), DraftTable({(1,): (2, 0.5)})
    (alike,) = Drafter([1, 2, 3, 1], [table], experience).guess(1)
    (other,) = Drafter([1, 4, 3, 1], [table], experience).guess(1)
    assert alike.token == other.token == 2
    assert alike.chance > other.chance
    for _ in range(200):
        experience.learn(other, 4)
    assert Drafter([1, 2, 3, 1], [table], experience).guess(1) == [alike]


def break_table(**changes: np.ndarray) -> bytes:
    tensors = load(DraftTable({(1,): (5, 0.5), (2, 1): (6, 0.5)}).dump())
    return save({**tensors, **changes})


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not a readable safetensors file"),
        (save({"tokens": np.zeros(1, np.int32)}), "holds tokens, not contexts, tokens, shares"),
        (break_table(tokens=np.zeros(2, np.int64)), r"tokens is int64 \(2,\), not int32 \(2,\)"),
        (break_table(contexts=np.zeros((2, 9), np.int32)), r"contexts is int32 \(2, 9\)"),
        (break_table(tokens=np.array([0, VOCABULARY], np.int32)), "outside the vocabulary"),
        (break_table(tokens=np.array([0, -1], np.int32)), "outside the vocabulary"),
        (break_table(contexts=np.full((2, LONGEST_CONTEXT), -2, np.int32)), "outside the vocabulary"),
        (break_table(contexts=np.full((2, LONGEST_CONTEXT), -1, np.int32)), "a gap, or no token"),
        (break_table(contexts=np.array([[1, -1, 1]] * 2, np.int32)), "a gap, or no token"),
        (break_table(tokens=np.zeros(MOST_ENTRIES + 1, np.int32)), "at most"),
    ],
)
def test_what_is_no_table_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(IntegrityError, match=reason):
        DraftTable.read(raw, "x", VOCABULARY)


# --- how many -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), max_size=8), st.lists(st.floats(0.5, 9), min_size=9, max_size=9))
def test_no_other_length_gives_more_tokens_per_second(chances: list[float], seconds: list[float]) -> None:
    speeds = [(1 + sum(np.prod(chances[: n + 1]) for n in range(length))) / seconds[length] for length in range(len(chances) + 1)]
    assert speeds[choose_length(chances, seconds)] == pytest.approx(max(speeds))


def test_nothing_is_guessed_before_a_step_was_measured() -> None:
    costs = StepCosts()
    assert choose_length([1.0] * 8, costs.estimate(8, 2)) == 0
    assert find_least_chance(costs.estimate(8, 2)) == 0


@given(st.floats(0.1, 10), st.floats(0, 1), st.integers(0, 10**6))
def test_steps_that_lie_on_a_line_are_found_to(first: float, share: float, seed: int) -> None:
    costs, slope = StepCosts(), first * share / 2
    for rows in np.random.default_rng(seed).integers(2, 10, 300):
        costs.note(int(rows), first + slope * rows)
    expected = [first + slope * max(guesses + 1, 2) for guesses in range(9)]
    assert costs.estimate(8, 2) == pytest.approx(expected, rel=0.1)
    costs.note(1, first / 2)
    assert costs.estimate(8, 1) == pytest.approx([first / 2, *expected[1:]], rel=0.1)


def test_other_work_on_the_machine_moves_costs_little() -> None:
    costs = StepCosts()
    for turn in range(300):
        costs.note(2 + turn % 3, 100.0 if turn % 50 == 49 else 1.0)
    assert max(costs.estimate(8, 2)) < 1.5


def test_other_lengths_are_tried_now_and_then() -> None:
    costs = StepCosts()
    chosen = [costs.probe(2, 4) for _ in range(200)]
    assert set(chosen) == {0, 2, 3}
    assert chosen.count(2) > 190
    assert {costs.probe(0, 0) for _ in range(200)} == {0}


def test_what_does_not_pay_is_tried_seldom() -> None:
    experience = Experience()
    assert experience.recommend()
    for _ in range(100):
        experience.note_cost(1.3)
    assert sum(experience.recommend() for _ in range(160)) == 10
    for _ in range(100):
        experience.note_cost(0.7)
    assert sum(experience.recommend() for _ in range(160)) == 150
