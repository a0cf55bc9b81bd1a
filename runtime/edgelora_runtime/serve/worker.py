"""Workers: a few threads per bundle, which run requests that share steps, and a bounded queue before them."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from edgelora_runtime.serve.failures import RequestFailed
from edgelora_runtime.serve.policy import take_next

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

_REMEMBERED = 32  # durations of requests that Retry-After is guessed from
_LONGEST_RETRY = 60  # seconds


class _End:
    """The last event of a request."""


class _Inbox:
    """Events on their way to an event loop. It is woken once for all that come before it gets to them.

    Waking costs a system call, in which a thread gives the interpreter away, and the threads of a shared step all emit at once.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._events: list[tuple[asyncio.Queue[object], object]] = []

    def put(self, queue: asyncio.Queue[object], event: object) -> None:
        """Delivers an event to a queue of the loop, from any thread. Raises RuntimeError if the loop has been closed."""
        with self._lock:
            self._events.append((queue, event))
            if len(self._events) > 1:
                return
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            with self._lock:
                self._events.clear()  # so that the next one finds the loop closed as well
            raise

    def _deliver(self) -> None:
        with self._lock:
            events, self._events = self._events, []
        for queue, event in events:
            queue.put_nowait(event)


class Job:
    """A request's place at a worker, from its admission until it has ended or was cancelled.

    key: requests of one key share steps. passed: later requests that went before it. waited: seconds until it ran.
    Events arrive on the event loop that admitted it. Safe to cancel from any thread.
    """

    def __init__(self, worker: Worker, inbox: _Inbox) -> None:
        self.key = ""
        self.passed = 0
        self.waited = 0.0
        self.cancelled = False
        self.work: Callable[[Job], None] | None = None
        self.started = time.perf_counter()
        self._worker = worker
        self._inbox = inbox
        self._events: asyncio.Queue[object] = asyncio.Queue()
        self._stop: Callable[[], None] = lambda: None

    def submit(self, key: str, work: Callable[[Job], None]) -> None:
        """Queues the work, which runs in one of the worker's threads and emits events."""
        self.key, self.work = key, work
        self._worker.enqueue(self)

    def emit(self, event: object) -> None:
        """Sends an event to whoever follows the job."""
        try:
            self._inbox.put(self._events, event)
        except RuntimeError:  # the loop has been closed: nobody follows
            self.cancelled = True

    def stop_with(self, stop: Callable[[], None]) -> None:
        """Sets the function that ends what runs now. It is called at once if the job is cancelled already."""
        self._stop = stop
        if self.cancelled:
            stop()

    def cancel(self) -> None:
        """Ends the job: before its next step if it runs, at once if it waits. Frees its place."""
        self.cancelled = True
        self._stop()
        self._worker.forget(self)

    def finish(self, error: BaseException | None = None) -> None:
        """Ends the events, with an error that the follower gets."""
        self.emit(error if error is not None else _End())

    async def follow(self) -> AsyncIterator[Any]:
        """Yields the events. Raises the error that ended them."""
        while True:
            event = await self._events.get()
            if isinstance(event, _End):
                return
            if isinstance(event, BaseException):
                raise event
            yield event


class Worker:
    """Threads that run jobs, those of one key at a time, in the order of policy.py.

    rows: the most jobs that run together. queue: jobs that may hold a place besides those. patience: as in policy.py. on_switch:
    called when a job's key differs from the last one's.
    """

    def __init__(
        self, name: str, queue: int, patience: int, on_switch: Callable[[], None] = lambda: None, *, rows: int = 1
    ) -> None:
        self._places = queue + rows
        self._patience = patience
        self._on_switch = on_switch
        self._changed = threading.Condition()
        self._held: set[Job] = set()
        self._waiting: list[Job] = []
        self._running: set[Job] = set()
        self._current: str | None = None
        self._refusal: Callable[[], RequestFailed] | None = None
        self._closed = False
        self._inbox: _Inbox | None = None
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        names = [f"edgelora-serve-{name}-{row}" for row in range(rows)]
        self._threads = [threading.Thread(target=self._run, name=each, daemon=True) for each in names]
        for thread in self._threads:
            thread.start()

    @property
    def held(self) -> int:
        """Places that are taken: by jobs that run, wait or are being prepared."""
        return len(self._held)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def is_refusing(self) -> bool:
        return self._refusal is not None

    def admit(self) -> Job:
        """Gives a place to a request. Raises RequestFailed: 429 if none is free, 503 if the server is ending."""
        with self._changed:
            if self._refusal is not None:
                raise self._refusal()
            if len(self._held) >= self._places:
                raise RequestFailed(
                    429,
                    f"the queue is full with {self._places} requests; try again later",
                    code="queue_full",
                    retry_after=self._guess_retry(),
                )
            loop = asyncio.get_running_loop()
            if self._inbox is None or self._inbox.loop is not loop:
                self._inbox = _Inbox(loop)
            job = Job(self, self._inbox)
            self._held.add(job)
            return job

    def enqueue(self, job: Job) -> None:
        with self._changed:
            if job in self._held:  # else it was cancelled while it was prepared
                self._waiting.append(job)
                self._changed.notify_all()
            elif self._refusal is not None:
                job.finish(self._refusal())

    def forget(self, job: Job) -> None:
        """Takes a cancelled job's place back, unless it runs: then its end does."""
        with self._changed:
            if job in self._running:
                return
            if job in self._waiting:
                self._waiting.remove(job)
            self._held.discard(job)

    def refuse(self, refusal: Callable[[], RequestFailed]) -> None:
        """Refuses new requests from now on. Those that have a place go on."""
        with self._changed:
            self._refusal = refusal

    def cut(self) -> None:
        """Cancels all that have a place. Waiting ones get the refusal as their error."""
        with self._changed:
            jobs, waiting = list(self._held), list(self._waiting)
        for job in jobs:
            job.cancel()
        for job in waiting:
            job.finish(None if self._refusal is None else self._refusal())

    def close(self, timeout: float) -> None:
        """Ends the threads after the step that they run. Waits at most that many seconds."""
        self.cut()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _guess_retry(self) -> int:
        mean = sum(self._durations) / len(self._durations) if self._durations else 1.0
        return min(max(math.ceil(mean), 1), _LONGEST_RETRY)

    def _run(self) -> None:
        while (job := self._take()) is not None:
            started = time.perf_counter()
            job.waited = started - job.started
            error: BaseException | None = None
            try:
                assert job.work is not None
                if not job.cancelled:
                    job.work(job)
            except BaseException as caught:  # whatever it is, the thread goes on, and the follower tells
                error = caught
            with self._changed:
                self._running.discard(job)
                self._held.discard(job)
                self._durations.append(time.perf_counter() - started)
                self._changed.notify_all()  # others may have waited for the last one of its key
            job.finish(error)

    def _take(self) -> Job | None:
        with self._changed:
            while not self._closed:
                job = take_next(self._waiting, self._current, self._patience, running=len(self._running))
                if job is not None:
                    self._running.add(job)
                    if job.key != self._current:
                        self._current = job.key
                        self._on_switch()
                    return job
                self._changed.wait()
            return None
