"""A server with the page's routes and canned answers, which speaks the part of the API that the page uses.

Its answers depend on the prompt: "slow" streams until it is stopped, "fail" is refused, "cut" ends at the limit, and any other is
repeated with the model's name. It counts what it was asked and what was stopped.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from edgelora_runtime.serve.page.routes import page_routes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

FIDELITY = {"outcome": "passed", "tokens": 4096, "kl_mean": 0.002, "retention": 0.9821, "top1": 0.971}
MODELS: list[dict[str, Any]] = [
    {
        "id": "base",
        "kind": "merged",
        "mix": {},
        "fidelity": {**FIDELITY, "outcome": "measured", "retention": None, "top1": 0.942},
    },
    {"id": "sql", "kind": "merged", "mix": {"sql": 1.0}, "fidelity": FIDELITY},
    {"id": "clinic", "kind": "merged", "mix": {"sql": 0.5, "medical": 0.8}, "fidelity": {**FIDELITY, "outcome": "repaired"}},
    {"id": "any", "kind": "live", "mix": {"sql": 1.0}, "live_adapters": ["sql", "medical"], "fidelity": None},
    {"id": "auto", "kind": "router"},
]
ASKED: list[dict[str, Any]] = []
STOPPED: list[str] = []
KEY = ""


def is_refused(request: Request) -> bool:
    return bool(KEY) and request.headers.get("Authorization") != f"Bearer {KEY}"


def make_error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}, status)


async def list_models(request: Request) -> Response:
    if is_refused(request):
        return make_error(401, "this server wants an API key")
    return JSONResponse({"object": "list", "data": [{"object": "model", **model} for model in MODELS]})


async def answer(request: Request) -> Response:
    if is_refused(request):
        return make_error(401, "this server wants an API key")
    asked = await request.json()
    ASKED.append(asked)
    prompt = asked["messages"][-1]["content"]
    if prompt == "fail":
        return make_error(400, "the prompt has 9000 tokens, more than the context of 8192")
    return StreamingResponse(stream(request, asked, prompt), media_type="text/event-stream")


async def stream(request: Request, asked: dict[str, Any], prompt: str) -> AsyncIterator[str]:
    model = asked["model"]

    def event(delta: dict[str, str], finish: str | None = None, **extra: object) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
        return f"data: {json.dumps({'model': model, 'choices': choices, **extra})}\n\n"

    text = f"{model} says: {prompt}"
    pieces = ["tick "] * 2000 if prompt == "slow" else [text[at : at + 7] for at in range(0, len(text), 7)]
    yield event({"role": "assistant", "content": ""})
    if prompt == "think":
        yield event({"reasoning_content": "Let me see."})
    try:
        for piece in pieces:
            yield event({"content": piece})
            await asyncio.sleep(0.02)
    except (asyncio.CancelledError, GeneratorExit):
        STOPPED.append(model)
        raise
    finish = "length" if prompt == "cut" else "stop"
    receipt = {
        "variant": model,
        "milliseconds": 3.21,
        "cold": model == "clinic",
        "bytes_mapped": 12900000,
        "kv_reused_tokens": 64,
    }
    timings = {"prompt_n": 20, "prompt_ms": 41.7, "predicted_n": len(pieces), "predicted_ms": 900.0, "predicted_per_second": 58.4}
    yield event({}, finish, receipt=receipt, timings=timings)
    usage = {"prompt_tokens": 20, "completion_tokens": len(pieces), "total_tokens": 20 + len(pieces)}
    yield f"data: {json.dumps({'model': model, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


async def tell(request: Request) -> Response:
    return JSONResponse({"asked": ASKED, "stopped": STOPPED})


app = Starlette(
    routes=[
        *page_routes(),
        Route("/v1/models", list_models),
        Route("/v1/chat/completions", answer, methods=["POST"]),
        Route("/told", tell),
    ]
)

if __name__ == "__main__":
    KEY = sys.argv[2] if len(sys.argv) > 2 else ""
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", timeout_graceful_shutdown=1)
