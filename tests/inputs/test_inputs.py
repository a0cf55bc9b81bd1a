"""Inputs that people bring, each tried: equal to what transformers or PEFT gives, or refused in one line."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.inputs.cases import Case

CASES: list[Case] = [
    case
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if path.stem not in ("__init__", "cases", "test_inputs")
    for case in import_module(f"tests.inputs.{path.stem}").CASES
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_input(case: Case, tmp_path: Path) -> None:
    seen = case.check(tmp_path)
    assert seen
    assert "\n" not in seen
    assert seen.startswith("equal") == (case.ours == "equal"), seen


def test_names_are_distinct() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
