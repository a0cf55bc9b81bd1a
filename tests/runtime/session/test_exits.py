"""A process that ends beside daemon threads inside onnxruntime: it ends with its own exit code, and says nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgelora_runtime.session.process import NativeCalls

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]
BUNDLE = ROOT / "tests" / "runtime" / "bundle" / "golden" / "bundle"
PROGRAM = """
import sys, threading, time
from edgelora_runtime import Runtime
bundle, kernels, work = sys.argv[1:]
runtime = Runtime(bundle, threads=1, kernels=kernels)
runtime.generate("the cat", max_tokens=4)

def generate():
    while True:
        runtime.generate("the cat", max_tokens=20)

def open_sessions():
    while True:
        with Runtime(bundle, threads=1, kernels=kernels) as another:
            another.switch("tuned")

for _ in range(4):
    threading.Thread(target={"steps": generate, "opening": open_sessions}[work], daemon=True).start()
time.sleep(0.1)
sys.exit(7)
"""


@pytest.mark.parametrize("kernels", ["auto", "onnxruntime"])
@pytest.mark.parametrize("work", ["steps", "opening"])
def test_daemon_threads_do_not_abort_the_end(work: str, kernels: str) -> None:
    """Without the wait, some of them abort, and with longer steps all. Python itself may say that it opens nothing any more."""
    command = [sys.executable, "-c", PROGRAM, str(BUNDLE), kernels, work]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 7, done.stderr
        assert work == "opening" or done.stderr == ""


def test_the_end_waits_for_calls_and_lets_no_other_daemon_begin() -> None:
    calls, leave, order = NativeCalls(), threading.Event(), []

    def work(name: str) -> None:
        with calls.count():
            order.append(name)
            leave.wait()
            order.append(f"{name} is back")

    def end() -> None:
        calls.end()
        order.append("the end")

    first = threading.Thread(target=work, args=("first",), daemon=True)
    first.start()
    _wait_until(lambda: order == ["first"])
    ending = threading.Thread(target=end)
    ending.start()
    ending.join(0.05)
    late = threading.Thread(target=work, args=("late",), daemon=True)
    late.start()
    assert order == ["first"]
    leave.set()
    ending.join(10)
    late.join(0.05)
    assert order == ["first", "first is back", "the end"]
    with calls.count():  # the thread that ends the interpreter may still generate, in an exit handler
        assert late.is_alive()


def test_the_end_waits_no_longer_than_its_patience() -> None:
    calls = NativeCalls()
    with calls.count():
        started = time.monotonic()
        calls.end(patience=0.05)
        assert 0.05 <= time.monotonic() - started < 5


def _wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited 10 s")
