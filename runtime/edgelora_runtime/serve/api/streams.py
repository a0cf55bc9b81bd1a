"""Streamed responses: the failure of an answer that has not begun is a status, a later one is an event."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from starlette.responses import StreamingResponse

from edgelora_runtime.serve.failures import explain
from edgelora_runtime.serve.service import wait_for_client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from starlette.requests import Request

    from edgelora_runtime.serve.failures import RequestFailed

EVENTS = "text/event-stream"
LINES = "application/x-ndjson"


async def stream_response(
    request: Request, parts: AsyncGenerator[bytes], media_type: str, write_failure: Callable[[RequestFailed], bytes]
) -> StreamingResponse:
    """Returns a response of the parts, once there is a first one. A client that leaves closes the parts.

    Raises what the first part raises. write_failure: makes the last part of a stream that fails later.
    """
    try:
        first = await wait_for_client(request, _take_first(parts))
    except BaseException:
        await parts.aclose()
        raise
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_continue(first, parts, write_failure), media_type=media_type, headers=headers)


async def _take_first(parts: AsyncGenerator[bytes]) -> bytes:
    return await anext(parts)


async def _continue(
    first: bytes, parts: AsyncGenerator[bytes], write_failure: Callable[[RequestFailed], bytes]
) -> AsyncGenerator[bytes, Any]:
    async with aclosing(parts):
        yield first
        try:
            async for part in parts:
                yield part
        except Exception as error:
            yield write_failure(explain(error))
