"""Workers: places, errors and the end, without a model."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

from edgelora_runtime.serve.failures import RequestFailed
from edgelora_runtime.serve.service import refuse_ending
from edgelora_runtime.serve.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgelora_runtime.serve.worker import Job


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker("test", queue=2, patience=1)
    yield made
    made.close(5)


async def collect(job: Job) -> list[Any]:
    return [event async for event in job.follow()]


def test_places_are_bounded_and_come_back(worker: Worker) -> None:
    async def run() -> None:
        jobs = [worker.admit() for _ in range(3)]
        with pytest.raises(RequestFailed) as caught:
            worker.admit()
        assert caught.value.status == 429
        assert caught.value.retry_after is not None
        jobs[0].cancel()  # it was never submitted
        jobs.append(worker.admit())
        for number, job in enumerate(jobs[1:]):
            job.submit("a", lambda each, number=number: each.emit(number))  # type: ignore[misc]
        assert [await collect(job) for job in jobs[1:]] == [[0], [1], [2]]
        assert worker.held == 0

    asyncio.run(run())


def test_an_error_goes_to_its_follower_alone(worker: Worker) -> None:
    def fail(job: Job) -> None:
        raise SystemExit("even this")

    async def run() -> None:
        first, second = worker.admit(), worker.admit()
        first.submit("a", fail)
        second.submit("a", lambda job: job.emit("fine"))
        with pytest.raises(SystemExit):
            await collect(first)
        assert await collect(second) == ["fine"]

    asyncio.run(run())


def test_a_running_job_keeps_its_place_until_it_has_ended(worker: Worker) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(job: Job) -> None:
        begun.set()
        go_on.wait(10)

    async def run() -> None:
        job = worker.admit()
        job.submit("a", wait)
        await asyncio.to_thread(begun.wait, 10)
        job.cancel()
        assert worker.held == 1
        go_on.set()
        assert await collect(job) == []
        assert worker.held == 0

    asyncio.run(run())


def test_a_cut_ends_those_that_run_and_refuses_those_that_wait(worker: Worker) -> None:
    stopped, begun = threading.Event(), threading.Event()

    def wait(job: Job) -> None:
        job.stop_with(stopped.set)
        begun.set()
        assert stopped.wait(10)

    async def run() -> None:
        running, waiting, preparing = worker.admit(), worker.admit(), worker.admit()
        running.submit("a", wait)
        await asyncio.to_thread(begun.wait, 10)
        waiting.submit("a", lambda job: job.emit("never"))
        worker.refuse(refuse_ending)
        with pytest.raises(RequestFailed) as caught:
            worker.admit()
        assert caught.value.status == 503
        worker.cut()
        preparing.submit("a", lambda job: job.emit("never"))
        assert await collect(running) == []
        for job in (waiting, preparing):
            with pytest.raises(RequestFailed, match="shutting down"):
                await collect(job)
        assert worker.held == 0

    asyncio.run(run())


def test_jobs_of_one_key_run_together_and_others_wait_for_their_end() -> None:
    worker = Worker("rows", queue=8, patience=1, rows=3)
    together, order, lock = threading.Barrier(3), [], threading.Lock()

    def meet(job: Job) -> None:
        together.wait(10)  # three threads or none
        with lock:
            order.append(job.key)

    def note(job: Job) -> None:
        with lock:
            order.append(job.key)

    async def run() -> None:
        jobs = [worker.admit() for _ in range(5)]
        for job, key in zip(jobs, "aabaa", strict=True):
            job.key = key
        jobs[0].submit("a", meet)
        jobs[1].submit("a", meet)
        jobs[2].submit("b", note)
        jobs[3].submit("a", meet)
        jobs[4].submit("a", note)
        for job in jobs:
            assert await collect(job) == []
        assert worker.held == worker.running == 0

    asyncio.run(run())
    worker.close(5)
    assert order == [*"aaa", *"ba"], "b was passed once, so the last a waits for it"


def emit_all(job: Job, count: int) -> None:
    for number in range(count):
        job.emit(number)


def test_many_events_wake_the_loop_once_and_keep_their_order(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    wakes: list[Any] = []

    async def run() -> None:
        loop, job = asyncio.get_running_loop(), worker.admit()
        wake = loop.call_soon_threadsafe

        def count(call: Any, *given: Any) -> Any:
            wakes.append(call)
            return wake(call, *given)

        monkeypatch.setattr(loop, "call_soon_threadsafe", count)
        emit_all(job, 100)  # the loop cannot run meanwhile
        assert len(wakes) == 1
        job.finish()
        assert await collect(job) == [*range(100)]
        await asyncio.to_thread(emit_all, job, 1000)
        job.finish()
        assert await collect(job) == [*range(1000)]

    asyncio.run(run())


def test_events_after_the_loop_has_ended_cancel_their_jobs(worker: Worker) -> None:
    async def admit() -> list[Job]:
        return [worker.admit(), worker.admit()]

    for job in asyncio.run(admit()):
        job.emit("nobody follows")
        assert job.cancelled
