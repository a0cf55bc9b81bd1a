"""Environments of their own for peers whose packages do not go with ours, made once and kept in .venv-interop."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

_FOLDER = Path(__file__).resolve().parents[1] / ".venv-interop"
_NO_NETWORK = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "Temporary failure in name resolution")


def peer_python(name: str, packages: Sequence[str]) -> Path:
    """The interpreter of an environment with these packages, installed in this order; skips the test without a network."""
    stamp = hashlib.sha256("\n".join(packages).encode()).hexdigest()[:8]
    folder = _FOLDER / f"{name}-{stamp}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (folder / "installed").is_file():
        venv.create(folder, with_pip=True, clear=True)
        for package in packages:  # one by one: a torch that is there keeps pip from fetching another
            command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package]
            done = subprocess.run(command, capture_output=True, text=True)
            if any(sign in done.stderr for sign in _NO_NETWORK):
                pytest.skip(f"no network to install {package} for the {name} environment")
            assert done.returncode == 0, done.stderr
        (folder / "installed").touch()
    return python


def run_peer(python: Path, script: str, request: Any) -> Any:
    """Runs a script in an environment: `request` as JSON on its standard input, its last line of output is the answer."""
    done = subprocess.run([python, "-c", script], input=json.dumps(request), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
