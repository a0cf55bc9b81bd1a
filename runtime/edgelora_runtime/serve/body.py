"""Bodies of requests: read with a limit on bytes and on time, and parsed as one JSON object."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, NoReturn

from edgelora_runtime.bundle.strict_json import refuse_surrogates
from edgelora_runtime.serve.failures import ClientGone, RequestFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from starlette.requests import Request

_DROPPED = 32 << 20  # bytes of a refused body that are read and dropped, and the seconds that this may take
_DROPPING = 2.0
_GRACE = 0.05  # seconds for what lies in the socket when the time is over


async def read_object(request: Request, limit: int, timeout: float) -> dict[str, Any]:
    """Reads the JSON object of a request.

    limit: bytes. A longer body is refused by its stated length, or as soon as it passes the limit. timeout: seconds until the
    last byte. Raises RequestFailed: 413, 408, or 400 for anything but an object.
    """
    stated = request.headers.get("content-length", "0")
    if not stated.isdecimal() or int(stated) > limit:
        await _refuse_size(request, limit)
    return parse_object(await _wait_for(_read_body(request, limit), timeout))


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parses a JSON object strictly: no NaN, no infinity, no repeated key, no half of a surrogate pair.

    Raises RequestFailed with 400.
    """
    try:
        value = json.loads(raw.decode(), parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeats)
        refuse_surrogates(raw, value)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestFailed(400, f"the body is not valid JSON ({reason})", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestFailed(400, f"the body is a JSON {type(value).__name__}, not an object", code="invalid_json")
    return value


async def _wait_for(read: Coroutine[Any, Any, bytes], timeout: float) -> bytes:
    """Returns what is read within so many seconds. Raises RequestFailed with 408.

    What came while this process was stopped, or had no CPU, counts as read in time: it is taken before the time is looked at.
    """
    task = asyncio.ensure_future(read)
    try:
        for seconds in (timeout, _GRACE):
            await asyncio.wait({task}, timeout=seconds)
            if task.done():
                return await task
        raise RequestFailed(408, f"the body took more than {timeout:g} seconds", code="body_timeout")
    finally:
        task.cancel()


async def _read_body(request: Request, limit: int) -> bytes:
    raw = bytearray()
    async for chunk in _read_chunks(request):
        if len(raw) + len(chunk) > limit:
            await _refuse_size(request, limit)
        raw += chunk
    return bytes(raw)


async def _read_chunks(request: Request) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def _refuse_size(request: Request, limit: int) -> NoReturn:
    """Raises RequestFailed with 413. First drops what comes at once, since a client may read nothing before it has sent all."""
    left = _DROPPED
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DROPPING):
            async for chunk in _read_chunks(request):
                left -= len(chunk)
                if left < 0:
                    break
    raise RequestFailed(413, f"the body is larger than {limit} bytes; shorten it, or raise --max-body", code="body_too_large")


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object repeats a key")
    return value
