"""Runs attacks in worker processes, which may die, and starts another for those that are left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from tests.attacks.worker import ROOT, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

PATIENCE = 120  # seconds by the clock after which a worker counts as hung; the limit on work is far lower (worker.py)


def run_attacks(bundle: Path, numbers: Iterable[int]) -> Iterator[tuple[int, Outcome]]:
    """Runs the attacks with these numbers in listing.py, and yields what became of each."""
    left = list(numbers)
    while left:
        with _start(bundle) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise AssertionError("the worker of attacks does not start; see its message above")
            while left:
                number = left.pop(0)
                process.stdin.write(f"{number}\n")
                process.stdin.flush()
                watchdog = threading.Timer(PATIENCE, process.kill)
                watchdog.start()
                line = process.stdout.readline()
                watchdog.cancel()
                if not line:
                    yield number, Outcome(error="death", message=f"the process ended with {process.wait()}")
                    break
                yield number, Outcome(**json.loads(line))
            process.stdin.close()


def _start(bundle: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime")),
        "RUST_BACKTRACE": "0",
        "ORT_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-m", "tests.attacks.worker", str(bundle.resolve())]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
