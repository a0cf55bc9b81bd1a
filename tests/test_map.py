"""docs/map.md has one line per source file, and none for a file that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_LINE = re.compile(r"^\|\s*`(?P<path>[^`]+\.py)`\s*\|\s*(?P<what>.*?)\s*\|$", re.MULTILINE)


def map_lines() -> dict[str, str]:
    """What the map says of each file, by path relative to the repository."""
    lines = _LINE.findall((ROOT / "docs" / "map.md").read_text(encoding="utf-8"))
    paths = [path for path, _ in lines]
    assert len(paths) == len(set(paths)), f"a file stands twice in the map: {sorted(paths)}"
    return dict(lines)


def source_files() -> set[str]:
    found = [path for folder in ("edgelora", "export", "runtime") for path in (ROOT / folder).rglob("*.py")]
    found += (ROOT / "benchmarks").glob("*.py")
    return {path.relative_to(ROOT).as_posix() for path in found if path.stat().st_size}


def test_every_source_file_is_in_the_map() -> None:
    missing = sorted(source_files() - map_lines().keys())
    assert not missing, f"docs/map.md lacks {', '.join(missing)}"


def test_every_line_of_the_map_is_a_file() -> None:
    gone = sorted(path for path in map_lines() if not (ROOT / path).is_file())
    assert not gone, f"docs/map.md lists {', '.join(gone)}, which are not there"


def test_every_line_of_the_map_says_something() -> None:
    assert all(len(what) > 10 for what in map_lines().values())
