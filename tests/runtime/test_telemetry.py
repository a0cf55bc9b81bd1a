"""Nothing phones home: onnxruntime writes no device id and opens no socket, whichever package an app imports first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "runtime" / "bundle" / "golden" / "bundle"
SECONDS = 3  # with telemetry, the device id is there after one

# Runs sessions for a while; prints the sockets that the process had, wherever they lead.
CHECK = """\
import os, sys, time
{first}
import onnxruntime
from edgelora_runtime import Runtime
found, end = set(), time.time() + {seconds}
with Runtime({bundle!r}) as runtime:
    while time.time() < end:
        runtime.generate("the cat", max_tokens=2)
        for descriptor in os.listdir("/proc/self/fd"):
            try:
                found.add(os.readlink(f"/proc/self/fd/{{descriptor}}"))
            except OSError:
                pass
print(*[name for name in found if name.startswith("socket:")])
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the sockets of a process are read from /proc")
@pytest.mark.parametrize("first", ["edgelora_runtime", "edgelora_export.stream.layer_stream", "edgelora", "edgelora.cli.app"])
def test_no_file_and_no_socket(first: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    code = CHECK.format(first=f"import {first}", seconds=SECONDS, bundle=str(GOLDEN))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", "a socket was open"
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == []
