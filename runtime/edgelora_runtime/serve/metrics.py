"""The figures of a server, for Prometheus: requests, tokens, waiting, switches and memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from edgelora_runtime.answers.generation import Generation

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_OTHER = "other"  # paths without a route, so that no client makes up new series


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter("edgelora_requests", "Requests by path and status.", ["path", "status"], registry=self._registry)
        self.seconds = Histogram(
            "edgelora_request_seconds", "Time to the end of the answer.", ["path"], buckets=_SECONDS, registry=self._registry
        )
        self.waiting_seconds = Histogram(
            "edgelora_queue_seconds", "Time from a request's admission until it runs.", buckets=_SECONDS, registry=self._registry
        )
        self.first_token_seconds = Histogram(
            "edgelora_prefill_seconds", "Time to read a prompt.", buckets=_SECONDS, registry=self._registry
        )
        self.prompt_tokens = Counter("edgelora_prompt_tokens", "Tokens of prompts.", ["model"], registry=self._registry)
        self.cached_tokens = Counter(
            "edgelora_cached_tokens", "Tokens of prompts that came from the cache.", ["model"], registry=self._registry
        )
        self.written_tokens = Counter("edgelora_written_tokens", "Tokens written.", ["model"], registry=self._registry)
        self.finished = Counter("edgelora_answers", "Answers by the reason of their end.", ["reason"], registry=self._registry)
        self.cold_loads = Counter("edgelora_cold_loads", "Variants loaded for a request.", registry=self._registry)
        self.switches = Counter(
            "edgelora_switches", "Changes of variant or mix between two requests.", ["bundle"], registry=self._registry
        )
        self._gauges: dict[str, Gauge] = {}

    def watch(self, name: str, text: str, bundle: str, read: Callable[[], float]) -> None:
        """Adds a figure of a bundle that is read when the figures are."""
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, ["bundle"], registry=self._registry)
        self._gauges[name].labels(bundle).set_function(read)

    def note(self, generation: Generation, model: str) -> None:
        """Counts a finished answer. model: a variant's name, or "mix", so that clients make up no series."""
        self.prompt_tokens.labels(model).inc(generation.prompt_tokens)
        self.cached_tokens.labels(model).inc(generation.reused_tokens)
        self.written_tokens.labels(model).inc(len(generation.tokens))
        self.first_token_seconds.observe(generation.prefill_ms / 1e3)
        self.finished.labels(generation.finish_reason).inc()
        if generation.receipt.cold:
            self.cold_loads.inc()

    def render(self) -> bytes:
        """Returns the figures in Prometheus' text format."""
        return generate_latest(self._registry)


class CountRequests:
    """An ASGI application that counts requests and times them. paths: those that have a route."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else _OTHER
        started, status = time.perf_counter(), "none"

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)
