"""Examples in docstrings are tests: each is run and has to print what it says."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMPORT_ROOTS = {"edgelora": ROOT, "edgelora_export": ROOT / "export", "edgelora_runtime": ROOT / "runtime"}
PROMPT = ">>> "


def modules_with_examples() -> list[str]:
    """Dotted names of the modules whose source has an example; the others are not imported, as some need extras."""
    return [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for package, root in IMPORT_ROOTS.items()
        for path in sorted((root / package).rglob("*.py"))
        if PROMPT in path.read_text(encoding="utf-8")
    ]


def run_examples(name: str) -> tuple[int, str]:
    """How many examples a module's docstrings have, and a report of those that fail; empty if all pass."""
    module = import_module(name)
    runner = doctest.DocTestRunner(verbose=False)
    report: list[str] = []
    for found in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(found, out=report.append)
    return runner.tries, "".join(report)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_print_what_they_say(name: str) -> None:
    count, report = run_examples(name)
    assert count > 0, f"{name} has a {PROMPT.strip()} outside of its docstrings"
    assert not report, report


def test_packages_have_examples() -> None:
    """An empty list of parameters would skip the test above."""
    assert modules_with_examples()


def test_a_wrong_example_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with_a_wrong_example.py").write_text('"""One wrong sum.\n\n>>> 1 + 1\n3\n"""\n', encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    count, report = run_examples("with_a_wrong_example")
    assert count == 1
    assert "Expected:\n    3\nGot:\n    2" in report
