"""`edgelora train` as a command, cut short by signals at any moment: what it says, and that a resumed run is the same run."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WORDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as POSIX sends them")


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """The console script. A test in the background of a shell would pass on that SIGINT is ignored."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv[0] = 'edgelora'\nfrom edgelora.cli.entry import main; main()"
    )
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=pipe, stderr=pipe, text=True)


def kill_after(process: subprocess.Popen[str], steps: int, seconds: float, number: signal.Signals) -> str:
    """Sends a signal once a process has reported so many steps, and returns what it writes to standard error then."""
    assert process.stderr is not None
    seen, written = 0, ""
    for line in process.stderr:
        written += line
        seen += line.startswith("step ")
        if seen == steps:
            break
    assert seen == steps, written
    time.sleep(seconds)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return errors


def prepare(folder: Path, base: Path, steps: int) -> list[object]:
    rows = [{"prompt": f"the cat {number}\n", "completion": f"sat {number}" * (1 + number % 4)} for number in range(90)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = ["--max-steps", steps, "--batch-size", 2, "--dropout", 0.1, "--lr", 1e-3, "--log-every", 1]
    return ["train", "--base", base, "--data", "rows.jsonl", *settings]


def read_entries(folder: Path) -> list[dict[str, float]]:
    kept = ("step", "loss", "num_tokens", "grad_norm", "learning_rate")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name in kept} for line in lines]


@pytest.mark.parametrize("number", WORDS)
def test_a_signal_ends_a_run_with_a_checkpoint_and_the_command_that_goes_on(
    number: signal.Signals, tiny_base: Path, tmp_path: Path
) -> None:
    arguments = prepare(tmp_path, tiny_base, 100_000)
    process = start(tmp_path, *arguments, "--output", "new name")
    errors = kill_after(process, 3, 0.0, number).splitlines()
    code, word = WORDS[number]
    assert process.returncode == code
    (saved,) = (tmp_path / "new name.checkpoints").iterdir()
    command = shlex.join(["edgelora", *map(str, arguments), "--output", "new name", "--resume"])
    step = saved.name.removeprefix("step-")
    assert errors[-1] == f"edgelora: {word}: step {step} is saved in new name.checkpoints/{saved.name}; go on with: {command}"
    assert any(line.startswith("stopping after this step, with a checkpoint") for line in errors)
    assert not (tmp_path / "new name").exists()


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_ten_kills_at_random_moments_change_no_loss(quant: str, tiny_base: Path, tmp_path: Path) -> None:
    steps = 300
    arguments = [*prepare(tmp_path, tiny_base, steps), "--quant", quant, "--checkpoint-every", 5]
    whole = start(tmp_path, *arguments, "--output", "whole")
    _, errors = whole.communicate(timeout=600)
    assert whole.returncode == 0, errors
    draw = random.Random(23)
    for count in range(10):
        number = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[count % 3]
        process = start(tmp_path, *arguments, "--output", "cut", *(["--resume"] if count else []))
        errors = kill_after(process, draw.randint(7, 25), draw.uniform(0.0, 0.1), number)
        assert process.returncode == (-number if number == signal.SIGKILL else WORDS[number][0]), errors
        assert not (tmp_path / "cut").exists()
    process = start(tmp_path, *arguments, "--output", "cut", "--resume")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    expected, found = read_entries(tmp_path / "whole"), read_entries(tmp_path / "cut")
    assert len(found) == steps
    assert found == expected
    name = "adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "cut.checkpoints").exists()
