"""The chat page at /: files of the package, served as they are, with headers that forbid all but them."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No script, style or request but this server's own, and no frame around the page. Pictures could carry text out of a
# conversation, so there are none from elsewhere either.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


class PageFile(NamedTuple):
    """One file of the page. tag: its ETag, which changes with its bytes."""

    body: bytes
    media_type: str
    tag: str


@cache
def read_page() -> dict[str, PageFile]:
    """Reads the page's files, by name."""
    found = {}
    for entry in files("edgelora_runtime.serve").joinpath("page").iterdir():
        media_type = _TYPES.get(entry.name[entry.name.rfind(".") :])
        if media_type is not None:
            body = entry.read_bytes()
            found[entry.name] = PageFile(body, media_type, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return found


def page_routes() -> list[Route]:
    """Returns the routes of the page: / and /page/NAME.

    The files hold no secret, so they need no API key. The page asks for one if the server does, and sends it with each request.
    """
    from starlette.routing import Route

    return [Route("/", _serve, methods=["GET"]), Route("/page/{name}", _serve, methods=["GET"])]


async def _serve(request: Request) -> Response:
    from starlette.responses import JSONResponse, Response

    name = request.path_params.get("name", INDEX)
    file = read_page().get(name)
    if file is None:
        error = {"message": "the page has no such file", "type": "invalid_request_error", "param": None, "code": "not_found"}
        return JSONResponse({"error": error}, 404)
    headers = {**HEADERS, "ETag": file.tag}
    if request.headers.get("If-None-Match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
