"""The ASGI application: the routes of all APIs, behind the door of security.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edgelora_runtime.serve.api import chat, completions, embeddings, models, ollama, responses
from edgelora_runtime.serve.api.turns import Formats
from edgelora_runtime.serve.failures import ClientGone, RequestFailed, explain
from edgelora_runtime.serve.metrics import CountRequests
from edgelora_runtime.serve.openapi import describe_api
from edgelora_runtime.serve.page.routes import page_routes
from edgelora_runtime.serve.security import HEALTH, Guard, refuse

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

    from edgelora_runtime.serve.service import Service

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_CLIENT_GONE = 499  # nginx's status for it. Nobody reads it, but the figures count it


def build_app(service: Service) -> Starlette:
    """Builds the application of a service."""
    routes = [
        Route("/v1/chat/completions", chat.complete_chat, methods=["POST"]),
        Route("/v1/completions", completions.complete, methods=["POST"]),
        Route("/v1/responses", responses.respond, methods=["POST"]),
        Route("/v1/embeddings", embeddings.embed, methods=["POST"]),
        Route("/v1/models", models.list_models),
        Route("/v1/models/{model:path}", models.show_model),
        Route("/lora-adapters", models.list_adapters),
        Route("/api/chat", ollama.chat, methods=["POST"]),
        Route("/api/generate", ollama.generate, methods=["POST"]),
        Route("/api/embed", ollama.embed, methods=["POST"]),
        Route("/api/tags", ollama.list_tags),
        Route("/api/version", ollama.show_version),
        Route(HEALTH, show_health),
        Route("/metrics", show_metrics),
        Route("/openapi.json", show_description),
        *page_routes(),
    ]
    paths = [route.path for route in routes]
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(CountRequests, metrics=service.metrics, paths=paths),
            Middleware(Guard, settings=service.settings),
            Middleware(TellFailures),
        ],
        exception_handlers={RequestFailed: _tell, HTTPException: _tell_http},
    )
    app.router.redirect_slashes = False  # a redirect would lose the body, and tell the name of this host
    app.state.service = service
    app.state.formats = Formats()
    return app


async def show_health(request: Request) -> Response:
    """Tells whether the server takes requests: 503 once it is ending. Says nothing else, as it needs no key."""
    service: Service = request.app.state.service
    ending = service.is_ending
    return JSONResponse({"status": "ending" if ending else "ok"}, 503 if ending else 200)


async def show_metrics(request: Request) -> Response:
    """Returns the figures for Prometheus."""
    service: Service = request.app.state.service
    return Response(service.metrics.render(), media_type=_METRICS_TYPE)


async def show_description(request: Request) -> Response:  # noqa: ARG001  (a route's signature)
    """Returns the OpenAPI description."""
    return JSONResponse(describe_api())


class TellFailures:
    """An ASGI application that turns every exception into an answer, so that no client and no log gets a traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def note_start(message: object) -> None:
            nonlocal begun
            begun = True
            await send(message)  # type: ignore[arg-type]  # a message, as it came

        try:
            await self._app(scope, receive, note_start)
        except ClientGone:
            if not begun:
                await Response(status_code=_CLIENT_GONE)(scope, receive, send)
        except Exception as error:
            failed = explain(error)
            if not begun:
                await refuse(failed, scope["path"])(scope, receive, send)


async def _tell(request: Request, error: Exception) -> Response:
    return refuse(explain(error), request.url.path)


async def _tell_http(request: Request, error: Exception) -> Response:
    """Returns Starlette's own refusals, an unknown path or method, in the form of the API."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = f"no route {path[:100]}" if error.status_code == 404 else f"{request.method} is not allowed for {path[:100]}"
    response = refuse(RequestFailed(error.status_code, message, code="unknown_route"), path)
    response.headers.update(error.headers or {})
    return response
