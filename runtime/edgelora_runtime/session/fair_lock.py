"""A lock that serves waiting threads in the order of their arrival."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from edgelora_runtime.session.process import leave_in_child

if TYPE_CHECKING:
    from types import TracebackType


class FairLock:
    """A first-come, first-served lock.

    A thread that releases the lock and acquires it again queues behind all that wait. threading.Lock guarantees no order, and a
    stream that steps in a tight loop would take it again and again.
    """

    def __init__(self) -> None:
        self._state = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()
        leave_in_child("Runtime", self, "_state")

    def __enter__(self) -> None:
        with self._state:
            if not self._held:
                self._held = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        try:
            gate.acquire()  # until the thread before releases it
        except BaseException:  # an interrupt: the next thread must not wait for this one
            with self._state:
                if gate in self._waiting:
                    self._waiting.remove(gate)
                    raise
            self._release()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._release()

    def _release(self) -> None:
        with self._state:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False


class StepLock(FairLock):
    """A lock that one step at a time holds, of any model that shares the cores.

    prompts: a lock of its own, which a chunk of a prompt takes first, so that at most one chunk waits between two steps.
    requests: those that are being answered. With several, prompts are read in small chunks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prompts = FairLock()
        self._requests = 0

    @property
    def requests(self) -> int:
        return self._requests

    def enter_request(self) -> None:
        with self._state:
            self._requests += 1

    def leave_request(self) -> None:
        with self._state:
            self._requests -= 1
