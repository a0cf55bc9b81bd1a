"""Code blocks of a Markdown page, and how a test runs them: in order, in one folder, as a reader would."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from edgelora.cli.app import main

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]*)\")?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. line: where it begins on its page. title: the file that it is the content of, or empty."""

    language: str
    title: str
    text: str
    line: int


@dataclass(frozen=True)
class Run:
    """What one block, or one command of it, printed, and what the page shows of that: None where it shows nothing."""

    what: str
    printed: str
    shown: str | None


def read_blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["title"] or "", found["text"], text.count("\n", 0, found.start()) + 1)
        for found in _BLOCK.finditer(text)
    ]


def split_commands(text: str) -> list[list[str]]:
    """The words of each command of a shell block; comments are left out, and a backslash continues a line."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_page(path: Path, folder: Path, demo: Path) -> Iterator[Run]:
    """Runs the blocks of a page in a folder. demo: what `edgelora demo` makes, as running it takes minutes.

    A titled block is written to its file. `text` right behind a block is what that prints; behind several commands, the last.
    """
    blocks = read_blocks(path)
    (folder / "edgelora-demo").symlink_to(demo, target_is_directory=True)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        shown = following.text if following is not None and following.language == "text" else None
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")
        if block.language == "bash":
            commands = split_commands(block.text)
            for number, words in enumerate(commands, 1):
                printed = run_command(words, folder)
                if printed is not None:
                    yield Run(" ".join(words), printed, shown if number == len(commands) else None)
        elif block.language == "python":
            yield Run(f"{path.name}, line {block.line}", run_python(block.text, folder), shown)


def run_command(words: list[str], folder: Path) -> str | None:
    """What a command prints; None for one that sets up what the tests run in, which is only checked to be one of those."""
    if words[0] == "edgelora":
        return None if words == ["edgelora", "demo"] else run_edgelora(words, folder)
    check_set_up(words)
    return None


def run_edgelora(words: list[str], folder: Path) -> str:
    printed = io.StringIO()
    code: object = 0
    with contextlib.chdir(folder), patch.object(sys, "argv", words), contextlib.redirect_stdout(printed):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    assert not code, f"{' '.join(words)} exits with {code}: {printed.getvalue()}"
    return printed.getvalue()


def run_python(code: str, folder: Path) -> str:
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile(code, "<docs>", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def check_set_up(words: list[str]) -> None:
    """Commands that set up: targets of the Makefile, and installing from this checkout."""
    if words[0] == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert targets is not None
        unknown = set(words[1:]) - set(targets[1].split())
        assert not unknown, f"no target of the Makefile: {', '.join(unknown)}"
    elif words[:2] == ["pip", "install"]:
        for word in words[2:]:
            check_requirement(word)
    else:
        assert words[0] in ("python3", ".", "cd"), f"not a command that the tests run or know: {' '.join(words)}"


def check_requirement(word: str) -> None:
    """A local project with extras that pyproject.toml has."""
    import tomllib

    folder, _, extras = word.removesuffix("]").partition("[")
    project = ROOT / folder / "pyproject.toml"
    assert project.is_file(), f"pip install {word}: nothing to install there"
    known = tomllib.loads(project.read_text(encoding="utf-8"))["project"].get("optional-dependencies", {})
    unknown = {extra for extra in extras.split(",") if extra} - set(known)
    assert not unknown, f"pip install {word}: no extra {', '.join(unknown)}"


def check_imports(code: str) -> None:
    """Every name that a block imports from edgelora is there. Top-level await is allowed, as in asyncio's own prompt."""
    from importlib import import_module

    tree = compile(code, "<docs>", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert isinstance(tree, ast.Module)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("edgelora"):
            module = import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {', '.join(missing)}"
