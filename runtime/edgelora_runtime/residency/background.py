"""Work in a thread of its own, with a future for its result."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def run_in_background(call: Callable[[], T], name: str) -> Future[T]:
    """Runs a call in a new thread of that name, which does not keep the process alive. The future holds its result or error."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done
