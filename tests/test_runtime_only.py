"""The wheel without extras generates in an environment that has no torch, transformers, onnx or peft."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CHECK = """\
import importlib.util, sys
for name in ("torch", "transformers", "onnx", "onnx_ir", "peft", "bitsandbytes"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed"
import edgelora
with edgelora.Runtime(sys.argv[1]) as runtime:
    tokens = runtime.generate("the cat", variant="plain", max_tokens=8).tokens
    mixed = runtime.generate("the cat", mix={"plain": 0.6, "attention": -0.4, "rslora": 0.3}, max_tokens=8).tokens
    assert mixed == runtime.generate("the cat", variant="linear-live", max_tokens=8).tokens
    streamed = "".join(runtime.stream([{"role": "user", "content": "hi"}], variant="plain-live", max_tokens=8))
    assert runtime.logits([5, 6, 7], variant="ties").shape == (3, 300)
try:
    edgelora.export
except edgelora.MissingExtraError as error:
    assert "edgelora[export]" in str(error), error
else:
    raise SystemExit("export does not say what it needs")
print(list(tokens))
"""


def run(*command: object) -> str:
    """Standard output of a command that has to succeed, in an environment without this checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(list(map(str, command)), env=environment, cwd=ROOT.anchor, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_without_extras_generates(bundle4: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "wheels", ROOT)
    (wheel,) = (tmp_path / "wheels").glob("edgelora-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    folder = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    python, command = folder / "python", folder / "edgelora"
    run(python, "-m", "pip", "install", "--quiet", wheel)
    tokens = json.loads(run(python, "-c", CHECK, bundle4))
    printed = json.loads(run(command, "run", bundle4, "--variant", "plain", "--prompt", "the cat", "--max-tokens", 8, "--json"))
    assert printed["tokens"] == tokens
    assert json.loads(run(command, "verify", bundle4, "--json"))["ok"]
    assert json.loads(run(command, "doctor", "--json"))["packages"]["torch"] is None
    from edgelora import Runtime

    with Runtime(bundle4) as runtime:
        assert list(runtime.generate("the cat", variant="plain", max_tokens=8).tokens) == tokens
