"""Splits of rows: every row on one side, equal rows together, the same each time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora.data.rows import Row
from edgelora.data.split import split_rows
from edgelora_runtime.errors import InputError, UsageError

ROWS = [Row(f"question {number}", f" answer {number}") for number in range(200)]


@given(
    st.lists(st.integers(0, 30), min_size=2).filter(lambda found: len(set(found)) > 1), st.floats(0.01, 0.99), st.integers(0, 5)
)
def test_each_row_is_on_one_side(numbers: list[int], share: float, seed: int) -> None:
    rows = [ROWS[number] for number in numbers]
    train, validation = split_rows(rows, share, seed)
    assert train and validation
    assert not set(train) & set(validation)
    merged, remaining = list(train), list(validation)
    for row in rows:  # both keep the order of the file
        side = merged if merged and merged[0] == row else remaining
        assert side.pop(0) == row
    assert not merged and not remaining
    assert (train, validation) == split_rows(rows, share, seed)


def test_the_share_and_the_seed_decide() -> None:
    train, validation = split_rows(ROWS, 0.05, 0)
    assert (len(train), len(validation)) == (190, 10)
    assert split_rows(ROWS, 0.05, 1)[1] != validation
    assert [row.prompt for row in validation] != [f"question {number}" for number in range(10)], "drawn, not the first ones"


@pytest.mark.parametrize("share", [0, 1, -0.5, 3, float("nan")])
def test_other_shares_are_usage_errors(share: float) -> None:
    with pytest.raises(UsageError, match=r"validation .*: give a file, or a share"):
        split_rows(ROWS, share, 0)


@pytest.mark.parametrize("rows", [[], ROWS[:1], [ROWS[0]] * 9])
def test_rows_that_cannot_be_split_are_named(rows: list[Row]) -> None:
    with pytest.raises(InputError, match=rf"{len(rows)} rows hold .* too few to split"):
        split_rows(rows, 0.5, 0)
