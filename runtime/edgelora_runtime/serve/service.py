"""The service that all routes share: open bundles with their workers, and the way of a request through them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.serve.body import read_object
from edgelora_runtime.serve.failures import ClientGone, RequestFailed
from edgelora_runtime.serve.metrics import Metrics
from edgelora_runtime.serve.names import ModelNames
from edgelora_runtime.serve.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

    from starlette.requests import Request

    from edgelora_runtime.answers.generation import Generation
    from edgelora_runtime.answers.text_stream import Piece as TextPiece
    from edgelora_runtime.answers.text_stream import TextStream
    from edgelora_runtime.bundle.prompt import Prompt
    from edgelora_runtime.bundle.router import Route
    from edgelora_runtime.runtime import Runtime
    from edgelora_runtime.serve.names import ModelChoice
    from edgelora_runtime.serve.settings import ServeSettings
    from edgelora_runtime.serve.worker import Job

    Options = Sequence[Mapping[str, Any]]
    Fit = Callable[[Sequence[Any], Options], tuple[Sequence[Prompt], Options]]

_PREPARING = 2  # threads that check and tokenize: more would take the cores from the model
_ENDING = 5.0  # seconds that a step may take when the server ends


@dataclass(frozen=True)
class Piece:
    """A piece of an answer. index: the answer's place among those of the request. text: it knows its tokens."""

    index: int
    text: TextPiece


@dataclass(frozen=True)
class Ended:
    """The end of an answer."""

    index: int
    generation: Generation


class Service:
    """Open bundles by name, each with a worker, and what their requests have in common."""

    def __init__(self, bundles: Mapping[str, Runtime], settings: ServeSettings) -> None:
        self.settings = settings
        self.bundles = bundles
        self.names = ModelNames({name: runtime.bundle.manifest for name, runtime in bundles.items()})
        self.metrics = Metrics()
        self._workers = {name: self._start_worker(name) for name in bundles}
        self.opened = int(time.time())
        self.fingerprints = {name: _fingerprint(runtime) for name, runtime in bundles.items()}
        self._pool = ThreadPoolExecutor(_PREPARING, thread_name_prefix="edgelora-prepare")

    @property
    def is_ending(self) -> bool:
        return any(worker.is_refusing for worker in self._workers.values())

    @property
    def held(self) -> int:
        """Requests that have a place at a worker."""
        return sum(worker.held for worker in self._workers.values())

    def name_model(self, choice: ModelChoice, generation: Generation) -> str:
        """Returns the name of the model that answered: the router's choice for "auto", else as the request wrote it."""
        return choice.name if generation.route is None else self.names.write(choice.bundle, generation.route.variant)

    async def read(self, request: Request) -> dict[str, Any]:
        """Reads the JSON object of a request, within the server's limits."""
        return await read_object(request, self.settings.body_limit, self.settings.body_timeout)

    async def generate(
        self,
        choice: ModelChoice,
        prompts: Sequence[Prompt],
        options: Sequence[Mapping[str, Any]],
        fit: Fit | None = None,
    ) -> AsyncGenerator[Piece | Ended]:
        """Answers prompts with a model, one after another.

        options: of Runtime.stream(), one for each prompt. fit: changes prompts and options, in a thread, once the request has its
        place. Raises RequestFailed or the runtime's errors before the first event.
        Closing the iterator cancels what is left.
        """
        runtime = self.bundles[choice.bundle]
        prepare = partial(_prepare, runtime, choice, prompts, options, fit)
        async with aclosing(self._run(choice.bundle, prepare)) as events:
            async for event in events:
                if isinstance(event, Ended):
                    self.metrics.note(event.generation, "mix" if choice.mix is not None else event.generation.variant)
                    if event.generation.finish_reason == "cancelled":  # and somebody still listens
                        raise refuse_ending()
                yield event

    async def compute(self, choice: ModelChoice, call: Callable[[], Sequence[Callable[[], Any]]]) -> list[Any]:
        """Runs what a call prepares, in the worker's thread, and returns its results. A cancellation ends it between two."""

        def prepare() -> tuple[str, Callable[[Job], None]]:
            steps = call()

            def work(job: Job) -> None:
                for step in steps:
                    if job.cancelled:
                        return
                    job.emit(step())

            return self.bundles[choice.bundle].name_group(choice.variant, choice.mix), work

        return [event async for event in self._run(choice.bundle, prepare)]

    async def _run(self, bundle: str, prepare: Callable[[], tuple[str, Callable[[Job], None]]]) -> AsyncGenerator[Any]:
        job = self._workers[bundle].admit()
        try:
            key, work = await asyncio.get_running_loop().run_in_executor(self._pool, prepare)
            job.submit(key, work)
            first = True
            async for event in job.follow():
                if first:
                    self.metrics.waiting_seconds.observe(job.waited)
                    first = False
                yield event
        finally:
            job.cancel()

    def refuse_new(self) -> None:
        """Refuses new requests with 503 from now on. Those that were admitted go on."""
        for worker in self._workers.values():
            worker.refuse(refuse_ending)

    def cut(self) -> None:
        """Ends all requests before their next step."""
        for worker in self._workers.values():
            worker.cut()

    def close(self) -> None:
        """Ends the workers and closes the bundles."""
        self.refuse_new()
        for worker in self._workers.values():
            worker.close(_ENDING)
        self._pool.shutdown(wait=False, cancel_futures=True)
        for runtime in self.bundles.values():
            runtime.close()

    def _start_worker(self, name: str) -> Worker:
        switches = self.metrics.switches.labels(name)
        runtime, watch = self.bundles[name], self.metrics.watch
        worker = Worker(
            name, self.settings.queue, self.settings.patience, switches.inc, rows=min(self.settings.batch, runtime.batch)
        )
        watch("edgelora_held_requests", "Requests that run, wait or are prepared.", name, lambda: worker.held)
        watch("edgelora_running_requests", "Requests that run.", name, lambda: worker.running)
        watch("edgelora_memory_bytes", "Memory of loaded variants and prompts.", name, lambda: _count_bytes(runtime))
        return worker


async def wait_for_client(request: Request, answer: Awaitable[Any]) -> Any:
    """Returns the answer, or cancels it and raises ClientGone as soon as the client is gone.

    The body must have been read.
    """
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refuse_ending() -> RequestFailed:
    """Returns the failure of requests to a server that is about to end."""
    return RequestFailed(503, "the server is shutting down; ask again in a moment", code="shutting_down", retry_after=5)


def _prepare(
    runtime: Runtime,
    choice: ModelChoice,
    prompts: Sequence[Prompt],
    options: Sequence[Mapping[str, Any]],
    fit: Fit | None,
) -> tuple[str, Callable[[Job], None]]:
    """Checks and tokenizes all prompts. Returns the key of the choice, after routing, and the work."""
    selected: list[dict[str, Any]] = [{"variant": choice.variant} if choice.mix is None else {"mix": choice.mix}] * len(prompts)
    routes: list[Route | None] = [None] * len(prompts)
    if choice.variant == AUTO and choice.mix is None:  # by what the client wrote: fit() may add tools to it
        found = [runtime.route(prompt) for prompt in prompts]
        selected, routes = [{"variant": route.variant} for route in found], [*found]
    if fit is not None:
        prompts, options = fit(prompts, options)
    streams = [runtime.stream(prompt, **chosen, **each) for prompt, chosen, each in zip(prompts, selected, options, strict=True)]
    return runtime.name_group(**selected[0]), partial(_write_answers, streams, routes)


def _write_answers(streams: Sequence[TextStream], routes: Sequence[Route | None], job: Job) -> None:
    for index, (stream, route) in enumerate(zip(streams, routes, strict=True)):
        job.stop_with(stream.cancel)
        for text in stream:
            job.emit(Piece(index, text))
        assert stream.generation is not None
        job.emit(Ended(index, replace(stream.generation, route=route)))
        if job.cancelled:
            return


def _fingerprint(runtime: Runtime) -> str:
    """Returns a short text that differs between bundles whose answers may differ."""
    return f"fp_{hashlib.sha256(runtime.bundle.manifest.dump()).hexdigest()[:10]}"


def _count_bytes(runtime: Runtime) -> int:
    memory = runtime.memory
    return memory.mapped + memory.private + memory.live + memory.kv_caches
