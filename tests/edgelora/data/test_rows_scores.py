"""Rows are read strictly; scores against scikit-learn's formula, and by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora.data.rows import Row, read_rows
from edgelora.data.scores import exact_match, parse_slots, slot_f1
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WORDS = st.sampled_from(["a", "b", "c d"])
SLOTS = st.lists(st.tuples(WORDS, WORDS), max_size=4)


def write(slots: Sequence[tuple[str, str]]) -> str:
    return " " + ("; ".join(f"{name} = {value}" for name, value in slots) if slots else "none")


def reference_f1(written: Sequence[Sequence[tuple[str, str]]], right: Sequence[Sequence[tuple[str, str]]]) -> float:
    """2PR / (P + R), with hits counted row by row, each pair used once."""
    hit = 0
    for guess, truth in zip(written, right, strict=True):
        left = list(truth)
        for slot in guess:
            if slot in left:
                left.remove(slot)
                hit += 1
    found, wanted = sum(map(len, written)), sum(map(len, right))
    if hit == 0:
        return 0.0
    precision, recall = hit / found, hit / wanted
    return 2 * precision * recall / (precision + recall)


@given(st.lists(st.tuples(SLOTS, SLOTS), min_size=1, max_size=6))
def test_slot_f1_is_precision_and_recall(rows: list[tuple[list[tuple[str, str]], list[tuple[str, str]]]]) -> None:
    written, right = [one for one, _ in rows], [other for _, other in rows]
    found = slot_f1([write(slots) for slots in written], [write(slots) for slots in right])
    if any(right):
        assert found == pytest.approx(reference_f1(written, right))
    else:
        assert found is None, "a file of nothing but none has no slots to score"


@pytest.mark.parametrize(
    ("written", "right", "score"),
    [
        ([" a = 1"], [" a = 1"], 1.0),
        ([" a = 2"], [" a = 1"], 0.0),
        (["a=1 ;b = 2"], [" b = 2; a = 1"], 1.0),
        ([" a = 1; b = 2"], [" a = 1"], 2 / 3),
        ([" none"], [" a = 1"], 0.0),
        ([" some prose"], [" a = 1"], 0.0),
        ([" a = 1; "], [" a = 1"], 0.0),
        ([" a = 1; a = 1"], [" a = 1"], 2 / 3),
        ([" a = x = y"], [" a = x = y"], 1.0),
        ([" none", " a = 1"], [" none", " a = 1"], 1.0),
    ],
)
def test_slot_f1_by_hand(written: list[str], right: list[str], score: float) -> None:
    assert slot_f1(written, right) == pytest.approx(score)


@pytest.mark.parametrize("right", [[" SELECT x FROM y WHERE z"], [" a = 1", " prose"], [" none"]])
def test_completions_that_are_no_slots_have_no_slot_f1(right: list[str]) -> None:
    assert slot_f1(right, right) is None


@pytest.mark.parametrize("text", ["", "a", "= 1", "a =", "a = 1;", "; a = 1", "a = 1; b"])
def test_texts_that_are_no_slots(text: str) -> None:
    assert parse_slots(text) is None


def test_exact_match() -> None:
    assert exact_match([" yes\n", "no", "No", ""], ["yes", "no", "no", " "]) == 0.75
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a"], ["a", "b"])


# --- rows -----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.builds(Row, st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=5), st.booleans())
def test_rows_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[Row], ascii_only: bool) -> None:
    """U+2028 and similar characters are part of a row and end no line."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps(vars(row) | {"more": 1}, ensure_ascii=ascii_only) for row in rows]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    ("line", "mention"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is list"),
        ("3", "line 2 is int"),
        ("{}", "line 2 has no keys, which is no known shape"),
        ('{"prompt": "a"}', "line 2 has no completion"),
        ('{"prompt": "a", "completion": ""}', "line 2 has an empty completion; the shape prompt-completion is {"),
        ('{"prompt": "", "completion": "a"}', "line 2 has an empty prompt"),
        ('{"prompt": ["a"], "completion": "a"}', "line 2: prompt is a list of messages, and completion is str"),
        ('{"prompt": "a", "completion": 3}', "line 2 has no completion that is text"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, line: str, mention: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(InputError, match=mention):
        read_rows(path)


@pytest.mark.parametrize(
    ("raw", "mention"), [(None, "does not exist"), (b"", "no rows"), (b"\n \n", "no rows"), (b"\xff\xfe", "UTF-8")]
)
def test_files_without_rows(tmp_path: Path, raw: bytes | None, mention: str) -> None:
    if raw is not None:
        (tmp_path / "rows.jsonl").write_bytes(raw)
    with pytest.raises(InputError, match=mention):
        read_rows(tmp_path / "rows.jsonl")


def test_real_data_is_read(data_folder: Path) -> None:
    rows = read_rows(data_folder / "slots-buses.test.jsonl")
    assert len(rows) == 377
    right = [row.completion for row in rows]
    assert slot_f1(right, right) == 1.0
    assert slot_f1([" none"] * len(rows), right) == 0.0
    sql = read_rows(data_folder / "sql.test.jsonl")
    assert slot_f1([row.completion for row in sql], [row.completion for row in sql]) is None
