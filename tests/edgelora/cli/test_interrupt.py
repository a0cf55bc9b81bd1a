"""Ctrl-C ends a verb with exit code 130 and one line, at work and during imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "runtime" / "bundle" / "golden" / "bundle"
# The console script, which says when Python itself has started.
START = "import os, sys; os.write(1, b'up\\n'); from edgelora.cli.entry import main; sys.argv[0] = 'edgelora'; main()"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as POSIX sends them")


def interrupt(arguments: Sequence[object], seconds: float, folder: Path) -> tuple[int, str]:
    """Exit code and standard error of a command that gets SIGINT so long after Python has started."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    command = [sys.executable, "-c", START, *map(str, arguments)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def verbs(folder: Path, base: Path) -> dict[str, list[object]]:
    """Commands that last longer than the test waits; `run` and `chat` wait for their input."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "the cat", "completion": " sat"}\n' * 2000, encoding="utf-8")
    return {
        "run": ["run", GOLDEN, "--prompt", "-"],
        "chat": ["chat", GOLDEN],
        "eval": ["eval", GOLDEN, "--data", rows],
        "bench": ["bench", GOLDEN, "--prompt", 32, "--tokens", 16, "--rounds", 10000],
        "train": ["train", "--base", base, "--data", rows, "--output", folder / "adapter", "--epochs", 1000],
    }


@pytest.mark.parametrize("verb", ["run", "chat", "eval", "bench", "train"])
def test_at_work(verb: str, tiny_base: Path, tmp_path: Path) -> None:
    code, errors = interrupt(verbs(tmp_path, tiny_base)[verb], 12 if verb == "train" else 4, tmp_path)
    assert (code, errors.splitlines()[-1]) == (130, "edgelora: interrupted")
    assert "Traceback" not in errors
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("module", ["edgelora.cli.app", "typer", "edgelora_runtime.runtime", "onnxruntime"])
def test_during_imports(module: str, tmp_path: Path) -> None:
    """The interrupt comes while this module is looked for; where it comes by itself is chance."""
    hook = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        f"sys.argv = ['edgelora', 'run', {str(GOLDEN)!r}, '--prompt', 'the cat']\n"
        "from edgelora.cli.entry import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    done = subprocess.run([sys.executable, "-c", hook], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "edgelora: interrupted\n")
