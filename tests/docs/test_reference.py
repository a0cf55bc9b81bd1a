"""The reference pages say what the code says: generated ones are current, and the tables of the others are complete."""

from __future__ import annotations

import inspect
import re
import tomllib
from typing import TYPE_CHECKING, Any

import pytest

from docs import generate
from docs.generate import RECIPE_EXAMPLE, ROOT, find_stale, write_command_page, write_recipe_page
from edgelora.exporting.recipe import parse_recipe
from edgelora.mix.methods import MIX_METHODS
from edgelora_runtime import Runtime
from edgelora_runtime.decode.options import GenerateOptions

if TYPE_CHECKING:
    from pathlib import Path

REFERENCE = ROOT / "docs" / "reference"


def read_table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of a page, code marks left out, without the table's own head."""
    section = page.partition(f"\n{heading}\n")[2]
    assert section, f"no heading {heading}"
    lines = section.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def test_recipe_page_is_current() -> None:
    assert (REFERENCE / "recipe.md").read_text(encoding="utf-8") == write_recipe_page(), "run python docs/generate.py"


def test_command_page_is_current() -> None:
    assert (REFERENCE / "command-line.md").read_text(encoding="utf-8") == write_command_page(), "run python docs/generate.py"


def test_recipe_example_is_a_recipe(tmp_path: Path) -> None:
    recipe = parse_recipe(tomllib.loads(RECIPE_EXAMPLE), tmp_path)
    assert {variant.kind for variant in recipe.variants.values()} == {"merged", "live"}
    assert recipe.router is not None


def test_recipe_page_has_every_key_that_the_parser_knows(tmp_path: Path) -> None:
    page = (REFERENCE / "recipe.md").read_text(encoding="utf-8")
    tables: dict[str, dict[str, Any]] = {"Top level": {"x": 1}, "Gate": {"gate": {"x": 1}}, "Router": {"router": {"x": 1}}}
    tables |= {"Variants": {"variants": {"a": {"x": 1}}}, "Quantization": {"quantization": {"x": 1}}}
    for heading, wrong in tables.items():
        with pytest.raises(ValueError, match="known: ") as refused:
            parse_recipe(wrong, tmp_path)
        known = re.findall(r"not a known key; known: ([\w, ]+)", str(refused.value))[0].split(", ")
        assert [row[0] for row in read_table(page, f"## {heading}")] == known


def test_command_page_has_every_verb() -> None:
    page = (REFERENCE / "command-line.md").read_text(encoding="utf-8")
    verbs = re.findall(r"^#+ edgelora (.*)$", page, re.MULTILINE)
    assert {"train", "compose", "compose learn", "export", "run", "demo"} <= set(verbs)
    assert len(verbs) == len(set(verbs))


def test_mixing_page_has_every_method() -> None:
    page = (ROOT / "docs" / "guides" / "mixing.md").read_text(encoding="utf-8")
    rows = read_table(page, "## Methods")
    assert [row[0] for row in rows] == list(MIX_METHODS)
    for name, _, reads, kind, _ in rows:
        method = MIX_METHODS[name]
        assert (reads.split(", ") if reads != "–" else []) == list(method.settings), name
        assert kind.startswith("exact") == (method.factored is not None), name


def request_defaults() -> dict[str, object]:
    """Defaults of a request's options: as their declaration says, or as the signature of stream() does."""
    declared = GenerateOptions.__annotations__
    if any(hasattr(hint, "__metadata__") for hint in declared.values()):
        return {name: hint.__metadata__[0].default for name, hint in declared.items()}
    parameters = inspect.signature(Runtime.stream).parameters
    return {name: each.default for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}


def test_python_page_has_every_option_of_a_request() -> None:
    page = (REFERENCE / "python.md").read_text(encoding="utf-8")
    options = {row[0]: row[1] for row in read_table(page, "## Options of a request")}
    assert set(options) == set(GenerateOptions.__annotations__)
    defaults = {name: default.replace('"', "'") for name, default in options.items()}
    assert defaults == {name: repr(default) for name, default in request_defaults().items()}


def test_python_page_has_every_option_of_the_runtime() -> None:
    page = (REFERENCE / "python.md").read_text(encoding="utf-8")
    options = {row[0]: row[1].replace('"', "'") for row in read_table(page, "## Runtime")}
    parameters = inspect.signature(Runtime).parameters
    assert options == {name: repr(each.default) for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}


def test_python_page_has_no_member_that_is_gone() -> None:
    page = (REFERENCE / "python.md").read_text(encoding="utf-8")
    named = re.findall(
        r"^\| `((?:\w+(?:\([^)]*\))?(?:`, `)?)+)` \| ", page.partition("| member |")[2].partition("##")[0], re.MULTILINE
    )
    members = {re.match(r"\w+", part)[0] for cell in named for part in cell.split("`, `")}  # type: ignore[index]
    assert len(members) > 15
    assert members <= set(dir(Runtime))


def test_stale_pages_are_found_and_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {tmp_path / "fresh.md": "a\n", tmp_path / "stale.md": "b\n", tmp_path / "absent.md": "c\n"}
    (tmp_path / "fresh.md").write_text("a\n", encoding="utf-8")
    (tmp_path / "stale.md").write_text("old\n", encoding="utf-8")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "generate", lambda: pages)
    said: list[str] = []
    assert generate.main(["--check"], say=said.append) == 1
    assert [line.split()[0] for line in said] == ["stale.md", "absent.md"]
    assert (tmp_path / "stale.md").read_text(encoding="utf-8") == "old\n"
    assert generate.main([], say=said.append) == 0
    assert not find_stale(pages)
    assert generate.main(["--check"], say=said.append) == 0
