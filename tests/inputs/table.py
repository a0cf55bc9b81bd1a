"""The table of tried inputs as a page of the docs. Run it to write the page: python -m tests.inputs.table."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.inputs.cases import Case

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "tried-inputs.md"
_NO_CASES = ("__init__", "cases", "table", "test_inputs")
_HEADINGS = {"base": "Bases", "adapter": "Adapters", "tokenizer": "Tokenizers and ends", "template": "Chat templates and rows"}


def list_cases() -> list[Case]:
    """Lists the cases of every topic."""
    topics = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _NO_CASES)
    return [case for topic in topics for case in import_module(f"tests.inputs.{topic}").CASES]


def write_page(cases: list[Case]) -> str:
    """Writes the page's text: a table for each part of a model."""
    lines = [
        "# Tried inputs",
        "",
        "Each line is a test (`tests/inputs`), which makes the input and runs both sides on it. They agree to 1e-5 in float32,",
        "or in every token or character, or edgelora refuses the input in one line.",
    ]
    for part, heading in _HEADINGS.items():
        lines += ["", f"## {heading}", "", "| input | transformers or PEFT | edgelora |", "|---|---|---|"]
        lines += [f"| {_cell(case.name)} | {_cell(case.theirs)} | {case.ours} |" for case in cases if case.part == part]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "\\<")
    return escaped.replace("{", "\\{").replace("[", "\\[").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(write_page(list_cases()), encoding="utf-8")
