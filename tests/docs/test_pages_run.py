"""README.md and docs/start.md do what they say: every block runs, in order, and prints what the page shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.docs.blocks import ROOT, check_imports, check_set_up, read_blocks, run_page, split_commands

if TYPE_CHECKING:
    from pathlib import Path

PAGES = ("README.md", "docs/start.md")
EVERY_PAGE = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
README_LINES = 150


ANSWERS = ("base", "dates", "mix", "merged", "live")  # labels of lines that go on with what a model writes


def mask_answers(text: str) -> list[str]:
    """The lines of a text without what models write in them."""
    labels = ((line, line.partition(": ")) for line in text.splitlines())
    return [label + colon if label in ANSWERS else line for line, (label, colon, _) in labels]


@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/start.md", marks=pytest.mark.slow)])
def test_blocks_run(page: str, quick_demo: Path, tmp_path: Path) -> None:
    """On a base that learns nothing: everything but what models write is as shown."""
    shown = 0
    for run in run_page(ROOT / page, tmp_path, quick_demo):
        if run.shown is None or run.what.startswith("edgelora run"):
            continue
        shown += 1
        assert mask_answers(run.printed) == mask_answers(run.shown), run.what
    assert shown == 1


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_blocks_print_what_the_page_shows(page: str, real_demo: Path, tmp_path: Path) -> None:
    shown = [run for run in run_page(ROOT / page, tmp_path, real_demo) if run.shown is not None]
    assert shown
    for run in shown:
        assert run.printed == run.shown, run.what


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_python_blocks_import_what_is_there(page: str) -> None:
    for block in read_blocks(ROOT / page):
        if block.language == "python":
            check_imports(block.text)


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES


def test_readme_has_no_block_that_is_not_run() -> None:
    """Indented blocks would slip through; the picture is the one that is no code."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        fenced = sum(block.text.count("\n") + 2 for block in read_blocks(ROOT / page))
        indented = [line for line in text.splitlines() if line.startswith("    ")]
        in_blocks = sum(line.startswith("    ") for block in read_blocks(ROOT / page) for line in block.text.splitlines())
        assert fenced > 0
        assert len(indented) - in_blocks == (3 if page == "README.md" else 0), f"{page} has an indented block"
        assert {block.language for block in read_blocks(ROOT / page)} <= {"bash", "python", "toml", "text"}


def test_commands_that_nobody_runs_are_found() -> None:
    assert split_commands('a "b c" \\\n  --d  # e\n# f\n') == [["a", "b c", "--d"]]
    for line in ("make nothing", "pip install '.[nothing]'", "pip install ./nowhere", "rm -rf ."):
        with pytest.raises(AssertionError):
            check_set_up(split_commands(line)[0])


def test_imports_of_names_that_are_gone_are_found() -> None:
    check_imports("from edgelora import Runtime\nawait f()")
    with pytest.raises(AssertionError, match="edgelora has no Nothing"):
        check_imports("from edgelora import Nothing")
