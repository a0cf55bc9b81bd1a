"""Ctrl-C and SIGTERM end a verb with one line and an exit code, at work, during imports, and wherever Python would lose them."""

from __future__ import annotations

import os
import random
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
# The console script, which says when edgelora answers signals. Before that, Python and the system do. A test that runs in the
# background of a shell passes on that SIGINT is ignored.
START = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from edgelora.cli.entry import exit_at_once, main; exit_at_once()\n"
    "sys.argv[0] = 'edgelora'; os.write(1, b'up\\n'); main()"
)
WORDS = {signal.SIGINT: (130, "edgelora: interrupted"), signal.SIGTERM: (143, "edgelora: terminated")}
VERBS = (
    "run", "chat", "serve", "eval", "bench", "train", "export", "inspect", "verify", "doctor", "demo",
    "compose", "report", "learn", "search",
)  # fmt: skip
SHORT = ("inspect", "verify", "doctor", "compose", "report", "export")
KEEPS = ("export", "search", "demo", "train")  # what they have finished, for the next run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as POSIX sends them")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}


def interrupt(
    arguments: Sequence[object], seconds: float, folder: Path, number: signal.Signals = signal.SIGINT, code: str = START
) -> tuple[int, str]:
    """Exit code and standard error of a command that gets a signal so long after it has started."""
    command = [sys.executable, "-X", "faulthandler", "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=folder, env=environment(), stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(seconds)
    process.send_signal(number)
    try:
        process.wait(timeout=40)  # before the end of its input, which would end some verbs
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # shows where it waits
    _, errors = process.communicate()
    return process.returncode, errors


def verbs(folder: Path, base: Path, adapters: dict[str, Path]) -> dict[str, list[object]]:
    """Commands of which most last longer than the test waits; `run` and `chat` wait for their input."""
    rows = folder / "rows.jsonl"
    lines = [f'{{"prompt": "the cat {number}", "completion": " sat"}}\n' for number in range(2000)]
    rows.write_text("".join(lines), encoding="utf-8")
    recipe = folder / "recipe.toml"
    recipe.write_text(f'base = "{base}"\n[adapters]\na = "{adapters["plain"]}"\n[variants.a]\nmix = {{ a = 1.0 }}\n')
    two = [f"--adapter=a={adapters['plain']}", f"--adapter=b={adapters['other']}"]
    new = folder / "new"
    learn = ["--base", base, *two, "--data", f"a={rows}", "--data", f"b={rows}", "--output", new]
    return {
        "run": ["run", GOLDEN, "--prompt", "-"],
        "chat": ["chat", GOLDEN],
        "serve": ["serve", GOLDEN, "--port", 0],
        "eval": ["eval", GOLDEN, "--data", rows],
        "bench": ["bench", GOLDEN, "--prompt", 32, "--tokens", 16, "--rounds", 10000],
        "train": ["train", "--base", base, "--data", rows, "--output", new, "--epochs", 1000],
        "export": ["export", recipe, "--output", new],
        "inspect": ["inspect", GOLDEN],
        "verify": ["verify", GOLDEN],
        "doctor": ["doctor"],
        "demo": ["demo", "--output", new],
        "compose": ["compose", *(f"{adapter}:0.5" for adapter in two), "--output", new],
        "report": ["compose", "report", *two, "--output", new],
        "learn": ["compose", "learn", *learn, "--steps", 100000, "--start", "linear"],
        "search": ["compose", "search", *learn, "--budget", 10000],
    }


@pytest.mark.parametrize("number", WORDS)
@pytest.mark.parametrize("verb", ["run", "chat", "serve"])  # test_train_interrupted.py has train
def test_at_work(verb: str, number: signal.Signals, tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    code, errors = interrupt(verbs(tmp_path, tiny_base, tiny_adapters)[verb], 3, tmp_path, number)
    assert (code, errors.splitlines()[-1]) == WORDS[number]
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.toml", "rows.jsonl"]


@pytest.mark.parametrize("number", WORDS)
@pytest.mark.parametrize("verb", VERBS)
def test_while_the_command_line_loads(
    verb: str, number: signal.Signals, tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    arguments = verbs(tmp_path, tiny_base, tiny_adapters)[verb]
    code, word = WORDS[number]
    assert interrupt(arguments, 0.02, tmp_path, number) == (code, f"{word}\n")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", WORDS)
def test_at_the_very_end_a_signal_changes_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """Python has given the signals back to the system, but the work is done and the exit code is decided."""
    code = (
        "import os, sys, time\n"
        "class Last:\n"
        "    def __init__(self): self.write, self.sleep = os.write, time.sleep\n"
        "    def __del__(self): self.write(1, b'up\\n'); self.sleep(1)\n"
        "sys.last = Last()\n"  # goes with the module sys, after Python's handlers
        "sys.argv = ['edgelora', '--version']\n"
        "from edgelora.cli.entry import main; main()"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline() != "up\n":
        pass
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.slow
def test_at_random_moments(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    """Sixty moments over all verbs, in imports and at work. A verb that was done before may end with 0."""
    draw = random.Random(22)
    done = 0
    for place in range(60):
        verb = VERBS[place % len(VERBS)]
        folder = tmp_path / f"{place}"
        folder.mkdir()
        number, seconds = draw.choice([*WORDS]), draw.uniform(0.002, 8.0)
        code, errors = interrupt(verbs(folder, tiny_base, tiny_adapters)[verb], seconds, folder, number)
        where = f"{verb} after {seconds:.3f} s: {code}, {errors}"
        if code == 0 and verb in SHORT:
            done += 1
            continue
        last = errors.splitlines()[-1].partition(": step ")[0]  # train says which step it saved
        assert (code, last) == WORDS[number], where
        assert "Traceback" not in errors and "Exception ignored" not in errors, where
        left = [path.name for path in folder.iterdir() if path.name not in ("rows.jsonl", "recipe.toml")]
        assert verb in KEEPS or not left, where
        assert not (folder / "new" / "bundle.json").exists(), where
    assert done < 30, "most moments came too late to show anything"


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
    done = subprocess.run([sys.executable, "-c", hook], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "edgelora: interrupted\n")


@pytest.mark.parametrize("number", WORDS)
def test_an_interrupt_that_python_loses_is_sent_again(number: signal.Signals, tmp_path: Path) -> None:
    """It comes inside a finalizer, whose exceptions Python only prints, while the main thread goes on."""
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # the tests may run where it is ignored
        "from edgelora.cli import app\n"
        "class Lost:\n"
        "    def __del__(self):\n"
        "        os.write(1, b'up\\n')\n"
        "        time.sleep(60)\n"
        "def run(arguments=None):\n"
        "    lost = Lost()\n"
        "    del lost\n"
        "    time.sleep(60)\n"
        "    print('never interrupted')\n"
        "app.main = run\n"
        "from edgelora.cli.entry import main; main()"
    )
    found, errors = interrupt([], 0.2, tmp_path, number, code)
    assert (found, errors) == (WORDS[number][0], WORDS[number][1] + "\n")


def test_an_ignored_sigint_stays_ignored(tmp_path: Path) -> None:
    """As under nohup, and in the background jobs of scripts."""
    code = START.replace("signal.default_int_handler", "signal.SIG_IGN")
    command = [sys.executable, "-c", code, "run", str(GOLDEN), "--prompt", "-", "--max-tokens", "1"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    for _ in range(4):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, errors = process.communicate("the cat", timeout=60)
    assert process.returncode == 0
    assert "interrupted" not in errors


@pytest.mark.parametrize(
    "arguments", [["inspect", GOLDEN], ["run", GOLDEN, "--prompt", "the cat"], ["--help"], ["inspect", GOLDEN, "--json"]]
)
def test_a_reader_that_is_gone_ends_the_verb_quietly(arguments: list[object], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "edgelora", *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_standard_output_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgelora", "inspect", str(GOLDEN)]
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(command, cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5
    assert done.stderr == "edgelora: No space left on device; free some space and run again\n"
