"""What a forked child must leave alone: its parent's sessions, whose threads it lacks, and locks that nobody releases.

A child that frees a session waits forever for the session's threads. So what its parent had open is never freed in a child, and
each use of it is an error. What the child opens itself works.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import TYPE_CHECKING, NoReturn, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


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
