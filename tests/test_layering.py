"""Imports point one way, edgelora_runtime ← edgelora_export ← edgelora, and starting up loads nothing heavy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "optuna", "ray"}
BANNED = {
    ROOT / "runtime" / "edgelora_runtime": {"edgelora_export", "edgelora", *HEAVY},
    ROOT / "export" / "edgelora_export": {"edgelora", "peft", "trl", "bitsandbytes"},
}
SOURCES = [(package, path) for package in BANNED for path in sorted(package.rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            names.add(ast.literal_eval(node.args[0]).split(".")[0])
    return names


@pytest.mark.parametrize(("package", "path"), SOURCES, ids=[path.stem for _, path in SOURCES])
def test_no_import_against_the_direction(package: Path, path: Path) -> None:
    assert not imported(path) & BANNED[package]


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 20
    assert "numpy" in imported(ROOT / "runtime" / "edgelora_runtime" / "model.py")


def run(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )


def test_importing_loads_nothing_heavy() -> None:
    """Must show 6."""
    done = run("import edgelora, edgelora_runtime, sys; assert not {'torch','transformers','onnx','peft'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_generating_loads_nothing_heavy(bundle4: Path) -> None:
    """Nor does any of the verbs that only read a bundle; what constraints need is not even looked for without one."""
    done = run(
        "import sys\n"
        "from edgelora import Runtime\n"
        f"with Runtime({str(bundle4)!r}) as runtime:\n"
        "    assert runtime.generate('the cat', max_tokens=3).tokens\n"
        "    assert runtime.generate('the cat', mix={'plain': 0.5}, max_tokens=3).tokens\n"
        "import edgelora.cli, edgelora.inspection, edgelora.evaluation, edgelora.doctor, edgelora.chat\n"
        "edgelora.doctor.diagnose()\n"
        f"heavy = {HEAVY | {'llguidance'}!r} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_has_no_side_effects() -> None:
    """No logging set-up, no environment writes, no threads, no output."""
    done = run(
        "import logging, os, threading\n"
        "before = dict(os.environ), list(logging.root.handlers), logging.root.level\n"
        "import edgelora, edgelora_runtime, edgelora.cli\n"
        "assert before == (dict(os.environ), list(logging.root.handlers), logging.root.level)\n"
        "assert threading.active_count() == 1\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_lazy_names_are_listed_and_unknown_ones_refused() -> None:
    import edgelora

    assert callable(edgelora.compose)
    assert callable(edgelora.export)
    assert set(edgelora._LAZY) <= set(edgelora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        edgelora.nothing  # noqa: B018


def test_a_missing_extra_is_named() -> None:
    done = run(
        "import sys\n"
        "for name in ('onnx_ir', 'onnx', 'torch', 'transformers'): sys.modules[name] = None\n"
        "import edgelora\n"
        "try: edgelora.export\n"
        "except edgelora.MissingExtraError as error: assert 'edgelora[export]' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    assert done.returncode == 0, done.stderr
