"""A web app around a bundle: answers stream as plain text, and a client that leaves ends its answer.

Run it with `BUNDLE=folder uvicorn fastapi_app:app`, after `pip install fastapi uvicorn`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator  # noqa: TC003 - FastAPI reads annotations when it runs
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from edgelora_runtime import EdgeloraError, Runtime


class Question(BaseModel):
    """The body of a request."""

    text: str
    variant: str | None = None
    max_tokens: int = 200


@asynccontextmanager
async def open_bundle(app: FastAPI) -> AsyncIterator[None]:
    """Keeps one runtime open as long as the app runs."""
    with Runtime(os.environ["BUNDLE"]) as runtime:
        app.state.runtime = runtime
        yield


app = FastAPI(lifespan=open_bundle)


@app.exception_handler(EdgeloraError)
async def refuse(_: Request, error: EdgeloraError) -> JSONResponse:
    """Answers what the runtime refuses with its one line."""
    return JSONResponse({"error": str(error)}, status_code=400)


@app.get("/variants")
async def list_variants(request: Request) -> list[str]:
    """Lists the names that a question may give as its variant."""
    return list(request.app.state.runtime.variants)


@app.post("/ask")
async def ask(question: Question, request: Request) -> StreamingResponse:
    """Streams the answer. What cannot be answered is refused before the first byte."""
    runtime: Runtime = request.app.state.runtime
    stream = runtime.stream(question.text, variant=question.variant, max_tokens=question.max_tokens)

    async def write() -> AsyncIterator[str]:
        async with stream:  # closes it when the client leaves, too
            async for piece in stream:
                yield piece

    return StreamingResponse(write(), media_type="text/plain; charset=utf-8")
