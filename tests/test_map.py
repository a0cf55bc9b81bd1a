"""docs/map.md is what docs/generate.py gives: one line per source file, and none for a file that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.generate import find_sources, read_summary, write_map

ROOT = Path(__file__).resolve().parents[1]
_LINE = re.compile(r"^\| `(?P<path>[^`]+)` \| (?P<what>.*) \|$", re.MULTILINE)


def test_map_is_current() -> None:
    stale = "docs/map.md is stale; run python docs/generate.py"
    assert (ROOT / "docs" / "map.md").read_text(encoding="utf-8") == write_map(), stale


def test_every_source_file_has_one_line_that_says_something() -> None:
    lines = _LINE.findall(write_map())
    folders = ("edgelora", "export", "runtime", "benchmarks")
    expected = sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in find_sources(ROOT / folder))
    assert sorted(path for path, _ in lines) == expected
    assert all(len(what) > 10 for _, what in lines)


@pytest.mark.parametrize(
    ("name", "text", "summary"),
    [
        ("a.py", '"""Reads a file, e.g. a page. Writes none."""\n', "Reads a file, e.g. a page"),
        ("b.py", '"""Gemma 3.x: norms\nof heads.\n\nMore."""\n', "Gemma 3.x: norms of heads"),
        ("c.cpp", "// Chooses kernels.\n//\n// More.\n#include <x>\n", "Chooses kernels"),
    ],
)
def test_summaries_are_first_sentences(tmp_path: Path, name: str, text: str, summary: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_summary(tmp_path / name) == summary


def test_a_file_that_says_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="begin it with a docstring"):
        read_summary(tmp_path / "d.py")
