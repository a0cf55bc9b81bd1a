"""One process at a time writes an output, and its lock ends with it, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgelora_export.weights.lock import locked
from edgelora_export.weights.publish import staged_folder, write_file
from edgelora_runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[3]


def publish_text(target: Path, text: str) -> None:
    with staged_folder(target, marker="marker") as folder:
        write_file(folder / "data", [text.encode()])
        write_file(folder / "marker", [b""])


def test_a_second_writer_is_refused_at_once(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", marker="marker") as folder:
        with pytest.raises(InputError, match=r"another process is writing .*out; wait until it ends"):
            publish_text(tmp_path / "out", "second")
        publish_text(tmp_path / "other", "beside it")
        write_file(folder / "marker", [b""])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["marker"]
    publish_text(tmp_path / "out", "third")


HOLDER = """\
import sys
from pathlib import Path
from edgelora_export.weights.publish import staged_folder
with staged_folder(Path(sys.argv[1]), marker="marker"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another process is writing"):
            publish_text(tmp_path / "out", "too early")
        process.kill()
    publish_text(tmp_path / "out", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(tmp_path: Path) -> None:
    """Many threads take turns. None of them holds the lock of a file that is gone."""
    inside, most, done = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, done
        turns = 0
        while turns < 20:
            with contextlib.suppress(InputError), locked(tmp_path / "out"):
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0)
                with guard:
                    inside -= 1
                    done += 1
                turns += 1
            time.sleep(0.0001)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most, done) == (0, 1, 8 * 20)
    assert list(tmp_path.iterdir()) == []
