"""Draft tokens come from the text and from tables, tables survive a round trip, and the chosen lengths are optimal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from edgelora_runtime import IntegrityError
from edgelora_runtime.bundle.draft_table import MAX_CONTEXT, MAX_ENTRIES, DraftTable
from edgelora_runtime.decode.drafter import AcceptanceStatistics, Drafter
from edgelora_runtime.session.step_costs import MAX_DRAFT_TOKENS, StepCosts, choose_length, find_break_even

VOCABULARY = 300
TEXTS = st.lists(st.integers(0, 4), min_size=1, max_size=40)
TOKENS = st.integers(0, VOCABULARY - 1)
CONTEXTS = st.lists(TOKENS, min_size=1, max_size=MAX_CONTEXT).map(tuple)
TABLES = st.dictionaries(CONTEXTS, st.tuples(TOKENS, st.integers(0, 255).map(lambda share: share / 255)), max_size=20)


def make_drafter(text: list[int], table: DraftTable | None = None, end_tokens: tuple[int, ...] = ()) -> Drafter:
    return Drafter(text, [table] if table is not None else [], AcceptanceStatistics(), end_tokens)


# --- from the text --------------------------------------------------------------------------------------------------------


def follow_latest(text: list[int]) -> int | None:
    """The token after the latest earlier occurrence of the last 3, 2 or 1 tokens."""
    for length in (3, 2, 1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[-length:]:
                return text[end]
    return None


@given(TEXTS, TEXTS)
def test_draft_tokens_follow_the_latest_and_longest_match(text: list[int], more: list[int]) -> None:
    drafter = make_drafter(text)
    for token in more:
        drafter.append(token)
    tokens = [draft.token for draft in drafter.propose(1)]
    expected = follow_latest(text + more)
    assert tokens == ([] if expected is None else [expected])


def test_a_repeated_text_is_continued() -> None:
    drafter = make_drafter([7, 8, 9, 7, 8, 9, 7])
    assert [draft.token for draft in drafter.propose(5)] == [8, 9, 7, 8, 9]


@given(TEXTS, st.integers(0, 4))
def test_no_end_token_is_proposed(text: list[int], end_token: int) -> None:
    assert end_token not in [draft.token for draft in make_drafter(text, end_tokens=(end_token,)).propose(MAX_DRAFT_TOKENS)]


def test_unlikely_draft_tokens_are_not_looked_up_after_the_first() -> None:
    assert len(make_drafter([1, 2, 3] * 4).propose(8, min_rate=1.0)) == 1


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


def test_a_smaller_vocabulary_is_never_proposed_what_it_lacks() -> None:
    table = DraftTable({(1,): (5, 0.9), (2, 1): (9, 0.5)})
    assert table.find((2, 1)) == (9, 0.5)
    assert table.limit(9).find((2, 1)) == (5, 0.9)
    assert len(table.limit(5)) == 0


def test_the_longest_context_decides() -> None:
    table = DraftTable({(1,): (5, 0.9), (2, 1): (6, 0.1)})
    assert table.find([2, 1]) == (6, 0.1)
    assert table.find([3, 1]) == (5, 0.9)
    assert table.find([3]) is None


def test_the_likelier_of_text_and_table_is_proposed() -> None:
    text = [1, 2, 3, 1]  # what followed 1 was 2
    assert [draft.token for draft in make_drafter(text, DraftTable({(1,): (9, 1.0)})).propose(1)] == [9]
    assert [draft.token for draft in make_drafter(text, DraftTable({(1,): (9, 0.01)})).propose(1)] == [2]


def test_statistics_decide_between_text_and_table() -> None:
    statistics, table = AcceptanceStatistics(), DraftTable({(1,): (9, 1.0)})
    for _ in range(200):
        statistics.record(statistics.rate_table_entry(9, 1.0, agrees=False), 2)
    assert [draft.token for draft in Drafter([1, 2, 3, 1], [table], statistics).propose(1)] == [2]


def test_a_draft_token_of_both_text_and_table_is_likelier_and_rated_separately() -> None:
    statistics, table = AcceptanceStatistics(), DraftTable({(1,): (2, 0.5)})
    (both,) = Drafter([1, 2, 3, 1], [table], statistics).propose(1)
    (other,) = Drafter([1, 4, 3, 1], [table], statistics).propose(1)
    assert both.token == other.token == 2
    assert both.rate > other.rate
    for _ in range(200):
        statistics.record(other, 4)
    assert Drafter([1, 2, 3, 1], [table], statistics).propose(1) == [both]


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
        (break_table(contexts=np.full((2, MAX_CONTEXT), -2, np.int32)), "outside the vocabulary"),
        (break_table(contexts=np.full((2, MAX_CONTEXT), -1, np.int32)), "a gap, or no token"),
        (break_table(contexts=np.array([[1, -1, 1]] * 2, np.int32)), "a gap, or no token"),
        (break_table(tokens=np.zeros(MAX_ENTRIES + 1, np.int32)), "at most"),
    ],
)
def test_a_broken_table_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(IntegrityError, match=reason):
        DraftTable.read(raw, "x", VOCABULARY)


# --- how many -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), max_size=8), st.lists(st.floats(0.5, 9), min_size=9, max_size=9))
def test_no_other_length_gives_more_tokens_per_second(rates: list[float], seconds: list[float]) -> None:
    speeds = [(1 + sum(np.prod(rates[: n + 1]) for n in range(length))) / seconds[length] for length in range(len(rates) + 1)]
    assert speeds[choose_length(rates, seconds)] == pytest.approx(max(speeds))


def test_nothing_is_drafted_before_a_step_was_measured() -> None:
    costs = StepCosts()
    assert choose_length([1.0] * 8, costs.estimate(8, 2)) == 0
    assert find_break_even(costs.estimate(8, 2)) == 0


@given(st.floats(0.1, 10), st.floats(0, 1), st.integers(0, 10**6))
def test_the_costs_of_steps_on_a_line_are_found(first: float, share: float, seed: int) -> None:
    costs, slope = StepCosts(), first * share / 2
    for rows in np.random.default_rng(seed).integers(2, 10, 300):
        costs.note(int(rows), first + slope * rows)
    expected = [first + slope * max(count + 1, 2) for count in range(9)]
    assert costs.estimate(8, 2) == pytest.approx(expected, rel=0.1)
    costs.note(1, first / 2)
    assert costs.estimate(8, 1) == pytest.approx([first / 2, *expected[1:]], rel=0.1)


def test_other_work_on_the_machine_moves_costs_little() -> None:
    costs = StepCosts()
    for step in range(300):
        costs.note(2 + step % 3, 100.0 if step % 50 == 49 else 1.0)
    assert max(costs.estimate(8, 2)) < 1.5


def test_other_lengths_are_tried_now_and_then() -> None:
    costs = StepCosts()
    chosen = [costs.probe(2, 4) for _ in range(200)]
    assert set(chosen) == {0, 2, 3}
    assert chosen.count(2) > 190
    assert {costs.probe(0, 0) for _ in range(200)} == {0}


def test_speculation_that_does_not_pay_is_rarely_tried() -> None:
    statistics = AcceptanceStatistics()
    assert statistics.recommend()
    for _ in range(100):
        statistics.record_cost(1.3)
    assert sum(statistics.recommend() for _ in range(160)) == 10
    for _ in range(100):
        statistics.record_cost(0.7)
    assert sum(statistics.recommend() for _ in range(160)) == 150
