"""Inputs that people bring, each tried: equal to what transformers or PEFT gives, or refused in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.inputs.table import PAGE, list_cases, write_page

if TYPE_CHECKING:
    from pathlib import Path

    from tests.inputs.cases import Case

CASES = list_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_input(case: Case, tmp_path: Path) -> None:
    seen = case.check(tmp_path)
    assert seen
    assert "\n" not in seen
    assert seen.startswith("equal") == (case.ours == "equal"), seen


def test_names_are_distinct() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == write_page(CASES), "run python -m tests.inputs.table"
