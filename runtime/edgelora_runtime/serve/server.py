"""Runs the server: binds the address, answers until a signal comes, then lets requests finish for a while."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from typing import TYPE_CHECKING

from edgelora_runtime.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping
    from types import FrameType

    from edgelora_runtime.runtime import Runtime
    from edgelora_runtime.serve.service import Service
    from edgelora_runtime.serve.settings import ServeSettings

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CONNECTIONS = 1000  # at once; more get 503
_HEADERS = 16 << 10  # bytes of a request's line and headers
_IDLE = 10  # seconds that a connection may be idle between two requests
_POLL = 0.02  # seconds between two looks at whether all is finished
_FLUSH = 2  # seconds for the last bytes of answers to reach their clients


def serve(
    bundles: Mapping[str, Runtime], settings: ServeSettings, on_ready: Callable[[str], None] = lambda url: None
) -> signal.Signals | None:
    """Serves bundles by name until SIGINT or SIGTERM, and returns that signal.

    New requests then get 503. Those that were admitted have `settings.drain` seconds, or until a second signal, and are then cut
    off between two steps. on_ready: called with the server's URL once it takes connections. Raises UsageError for an address that
    cannot be used, MissingExtraError without starlette, uvicorn, prometheus-client and jsonschema.
    """
    try:
        import jsonschema  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "starlette", "serve") from error
    from edgelora_runtime.serve.service import Service

    listening = _bind(settings.host, settings.port)
    service = Service(bundles, settings)
    try:
        return asyncio.run(_serve(service, listening, on_ready))
    finally:
        service.close()
        listening.close()


async def _serve(service: Service, listening: socket.socket, on_ready: Callable[[str], None]) -> signal.Signals | None:
    import uvicorn

    from edgelora_runtime.serve.app import build_app
    from edgelora_runtime.serve.protocol import TimedProtocol

    class Server(uvicorn.Server):
        """uvicorn's server, without its own handling of signals."""

        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None]:
            yield

    config = uvicorn.Config(
        build_app(service),
        http=TimedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=_HEADERS,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_FLUSH,
    )
    server = Server(config)
    received: list[signal.Signals] = []
    changed = asyncio.Event()
    with _handle_signals(received, changed):
        running = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started and not running.done():
            await asyncio.sleep(_POLL)
        on_ready(_write_url(service.settings.host, listening))
        ended = asyncio.create_task(changed.wait())
        await asyncio.wait({running, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            await _drain(service, received)
        server.should_exit = True
        await running
        ended.cancel()
    return received[0] if received else None


async def _drain(service: Service, received: list[signal.Signals]) -> None:
    """Refuses new requests, waits for the others until the deadline or a second signal, and cuts off what is left."""
    service.refuse_new()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + service.settings.drain
    while service.held and loop.time() < deadline and len(received) < 2:
        await asyncio.sleep(_POLL)
    service.cut()


@contextlib.contextmanager
def _handle_signals(received: list[signal.Signals], changed: asyncio.Event) -> Generator[None]:
    """Notes signals while the block runs. Only the main thread may handle them: elsewhere, none end the server."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (a handler's signature)
        received.append(signal.Signals(number))
        loop.call_soon_threadsafe(changed.set)

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bind(host: str, port: int) -> socket.socket:
    """Opens the listening socket. Raises UsageError for an address that cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"host {host!r} is no address of this machine ({error.strerror})") from None
    try:
        if hasattr(signal, "SIGHUP"):  # on Windows, the option would let a second server take the same port
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(_CONNECTIONS)
    except OSError as error:
        opened.close()
        raise UsageError(f"cannot listen on {host} port {port} ({error.strerror}); choose another with --port") from None
    opened.setblocking(False)
    return opened


def _write_url(host: str, listening: socket.socket) -> str:
    name = f"[{host.strip('[]')}]" if ":" in host else host
    return f"http://{name}:{listening.getsockname()[1]}"
