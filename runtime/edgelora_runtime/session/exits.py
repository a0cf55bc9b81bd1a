"""onnxruntime's calls at the interpreter's end, which waits for those of daemon threads.

A thread that comes back from a call once the interpreter ends is ended there, through C++ frames that cannot be left in that way:
the process aborts with "terminate called without an active exception". Daemon threads alone still run then. See
PyEval_RestoreThread in https://docs.python.org/3.11/c-api/init.html.
"""

from __future__ import annotations

import atexit
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from edgelora_runtime.session.forks import call_in_child

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

_PATIENCE = 10.0  # seconds that the end waits: for a chunk of a prompt, or for a session to open


class NativeCalls:
    """The calls that run, counted."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._ended = False

    @contextmanager
    def count(self) -> Iterator[None]:
        """Counts a call. A daemon thread that begins one after end() waits there for the process to end."""
        with self._changed:
            if self._ended and threading.current_thread().daemon:
                self._changed.wait_for(lambda: False)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def end(self, patience: float = _PATIENCE) -> None:
        """Waits until no call runs, so many seconds at most."""
        with self._changed:
            self._ended = True
            self._changed.wait_for(lambda: not self._running, patience)


_calls = NativeCalls()


def count_native_call() -> AbstractContextManager[None]:
    """Counts a call into onnxruntime, for as long as the block runs."""
    return _calls.count()


def _start_anew() -> None:
    global _calls  # a forked child has none of the threads that its parent counted
    _calls = NativeCalls()


@atexit.register
def _end() -> None:
    with suppress(KeyboardInterrupt):
        _calls.end()


call_in_child(_start_anew)
