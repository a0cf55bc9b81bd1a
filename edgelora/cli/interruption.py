"""Ctrl-C and SIGTERM: one line and an exit code, whenever they come.

While the command line loads, nothing has been begun, and the process ends on the spot. Later they raise KeyboardInterrupt, so
that every block cleans up what it has begun. Python loses an exception that is raised inside a weak reference's callback or a
finalizer, as happens while large packages load. Its hook for such exceptions then sets a timer that raises it again.

At its very end, Python gives both signals back to the system, which would end the process without a word, though all is done. So
they are ignored there.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from edgelora_runtime.errors import INTERRUPTED, TERMINATED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_AGAIN = 0.001  # seconds until a lost interrupt is raised again
_WORDS = {signal.SIGINT: ("interrupted", INTERRUPTED), signal.SIGTERM: ("terminated", TERMINATED)}
_received: signal.Signals | None = None


def exit_at_once() -> None:
    """Makes both signals end the process without any clean-up, for as long as there is nothing to clean up."""
    _handle_with(_exit)


def ignore_at_the_end() -> None:
    """Makes Python ignore both signals once it has joined all threads and run what other modules registered for its end."""
    atexit.register(_handle_with, signal.SIG_IGN)  # runs last if it is registered first


def raise_when_interrupted() -> None:
    """Makes both signals raise KeyboardInterrupt, also where Python would lose it."""
    _handle_with(_raise)
    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, _raise)
        sys.unraisablehook = _raise_again(sys.unraisablehook)


@contextmanager
def on_interrupt(act: Callable[[], object]) -> Iterator[None]:
    """Makes Ctrl-C call a function, and nothing else, inside a with block. SIGTERM ends the process as before."""
    before = signal.signal(signal.SIGINT, lambda number, frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def stop_when_interrupted(note: str | None) -> Iterator[Callable[[], bool]]:
    """Yields a function that is True once one of the signals has come, so that work can end where nothing is lost.

    note: what the user is then told, in one line, if anything. The second signal ends the work as elsewhere.
    """

    def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (a handler's signature)
        global _received
        _received = signal.Signals(number)
        if note is not None:
            os.write(2, f"{note}\n".encode())  # print could come in the midst of another print
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.getsignal(each) for each in _WORDS if signal.getsignal(each) is not signal.SIG_IGN}
    for each in before:
        signal.signal(each, ask)
    asked = _received
    try:
        yield lambda: _received is not asked
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def was_interrupted() -> bool:
    """True if one of the signals has come, whatever became of it."""
    return _received is not None


def describe_interruption() -> tuple[str, int]:
    """Returns the word for what ended the process, and its exit code."""
    return _WORDS[_received or signal.SIGINT]


def _handle_with(handler: Any) -> None:
    for number in _WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and background jobs of scripts ignore SIGINT
            signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001  (a handler's signature)
    word, code = _WORDS[signal.Signals(number)]
    os.write(2, f"edgelora: {word}\n".encode())
    os._exit(code)


def _raise(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001  (a handler's signature)
    global _received
    if number in _WORDS:
        _received = signal.Signals(number)
    raise KeyboardInterrupt


def _raise_again(hook: Any) -> Any:
    def handle(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            hook(unraisable)
        elif sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)  # a thread could wait here for a lock that this one holds

    return handle
