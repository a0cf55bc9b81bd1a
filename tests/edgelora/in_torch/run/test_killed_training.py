"""Training, killed at random moments: it goes on from the last checkpoint, and ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from edgelora.in_torch.run.checkpoints import find_last, read_step
from tests.forked_commands import KILLS, TERMINATIONS, WORDS, Commands, draw_signals

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")]
STEPS = 120


def read_course(folder: Path) -> list[tuple[float, ...]]:
    kept = ("step", "loss", "grad_norm", "learning_rate")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [tuple(entry[name] for name in kept) for entry in lines if "loss" in entry]


def test_killed_training(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"the cat {number}\n", "completion": f"sat {number}" * (1 + number % 4)} for number in range(90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = ["--max-steps", STEPS, "--batch-size", 2, "--dropout", 0.1, "--lr", 1e-3, "--quant", "none", "--log-every", 1]
    arguments = ["train", "--base", tiny_base, "--data", "rows.jsonl", *settings, "--checkpoint-every", 2, "--output"]
    draw, name = random.Random(28), "adapter_model.safetensors"
    output, checkpoints = tmp_path / "cut", tmp_path / "cut.checkpoints"
    reached, finished, resumed = dict.fromkeys(WORDS, 0), 0, 0
    with Commands(tmp_path) as commands:
        whole = commands.run([*arguments, "whole"])
        assert whole.code == 0, whole.errors
        signals = draw_signals(draw)
        while signals:
            number, last = signals[-1], find_last(checkpoints)
            resume = [] if last is None else ["--resume"]
            resumed += last is not None
            ended = commands.run([*arguments, "cut", *resume], number, draw.uniform(0.0, 0.9 * whole.seconds))
            if ended.code == 0:
                finished += 1
                assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
                assert read_course(output) == read_course(tmp_path / "whole")
                assert not checkpoints.exists()
                shutil.rmtree(output)
                continue
            signals.pop()
            reached[number] += 1
            code, word = WORDS[number]
            assert ended.code == code, ended.errors
            assert not output.exists()
            found = find_last(checkpoints)
            assert last is None or (found is not None and read_step(found) >= read_step(last)), "the last checkpoint is gone"
            if word is not None:
                assert ended.errors.splitlines()[-1].startswith(word)
    assert reached == {signal.SIGKILL: KILLS, signal.SIGTERM: TERMINATIONS}
    print(f"{KILLS} kills, {TERMINATIONS} terminations: {resumed} runs went on from a checkpoint, {finished} runs finished")
    assert resumed
