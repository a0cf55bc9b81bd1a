"""The life of a process beside onnxruntime's threads: what a forked child must leave alone, and what its end waits for.

A child lacks its parent's threads, and locks that they held are never released there. A child that frees a session waits forever
for the session's threads. So what its parent had open is never freed in a child, and each use of it is an error. What the child
opens itself works.

A daemon thread that comes back from a call once the interpreter ends is ended there. It cannot leave C++ frames in that way, and
the process aborts with "terminate called without an active exception". So the end waits for such calls, and no other begins. See
PyEval_RestoreThread in https://docs.python.org/3.11/c-api/init.html.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, NoReturn, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

T = TypeVar("T")

_PATIENCE = 10.0  # seconds that the end waits: for a chunk of a prompt, or for a session to open


class Elsewhere:
    """A part of an object that belongs to the parent process. Each use raises UsageError, and there is nothing to free.

    kind: what a user calls the object.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse()

    def __enter__(self) -> NoReturn:
        self._refuse()

    def __exit__(self, *error: object) -> None:
        """Does nothing, as __enter__() raises."""

    def __next__(self) -> NoReturn:
        self._refuse()

    def clear(self) -> None:
        """Does nothing: what the parent holds is the parent's to free."""

    def _refuse(self) -> NoReturn:
        raise UsageError(f"this {self._kind} belongs to the process that forked this one; open one here, or spawn processes")


_KEPT: WeakSet[object] = WeakSet()
_OWNERS: WeakKeyDictionary[object, tuple[str, tuple[str, ...]]] = WeakKeyDictionary()


def keep_in_child(item: T) -> T:
    """Marks an object that no forked child may free, and returns it."""
    _watch_forks()
    _KEPT.add(item)
    return item


def leave_in_child(kind: str, owner: object, *names: str) -> None:
    """Marks attributes of an object that become Elsewhere in a forked child. kind: what a user calls the object."""
    _watch_forks()
    _OWNERS[owner] = (kind, names)


def call_in_child(function: Callable[[], object]) -> None:
    """Calls a function in each forked child, before anything else runs there. Does nothing on Windows, which has no fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


@cache
def _watch_forks() -> None:
    call_in_child(_leave_parent)


def _leave_parent() -> None:
    for item in list(_KEPT):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))  # at the interpreter's end, too, nothing frees it
    for owner, (kind, names) in list(_OWNERS.items()):
        for name in names:
            setattr(owner, name, Elsewhere(kind))


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
