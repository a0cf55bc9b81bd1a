"""Two processes that train together give the adapter of one that computes the same rows in twice as many parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[3]


def run(folder: Path, *command: object) -> str:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


TWO = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m")


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_two_processes_give_the_adapter_of_one(tiny_base: Path, tmp_path: Path, quant: str) -> None:
    rows = [{"prompt": f"the cat {number}\n", "completion": f"sat {number}" * (1 + number % 4)} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = ["train", "--base", tiny_base, "--data", "rows.jsonl", "--quant", quant, "--batch-size", 8, "--max-steps", 12,
                "--lr", 1e-3, "--validation", 0.2, "--checkpoint-every", 5, "--json"]  # fmt: skip
    one = json.loads(run(tmp_path, sys.executable, "-m", "edgelora", *settings, "--output", "one", "--accumulation", 2))
    two = json.loads(run(tmp_path, *TWO, "edgelora", *settings, "--output", "two"))
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-5)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name, factor in first.items():
        np.testing.assert_allclose(second[name].astype(np.float32), factor.astype(np.float32), atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "rows.jsonl", "two"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(
        path.name for path in (tmp_path / "two").iterdir()
    )
