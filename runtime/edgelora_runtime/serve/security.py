"""The door of the server: which Host, Origin and key a request must have. It stands before every route.

A page on the web can make a browser call this machine. Its requests carry the page's Origin, which is refused unless it is the
server's own or one that was allowed. A page whose own name is made to point to this machine (DNS rebinding, as in CVE-2024-28224)
counts as same-origin for the browser, but its requests carry that name as Host. So a Host must be a name that was given to the
server, or an IP address, which nobody can rebind.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response

from edgelora_runtime.serve.failures import RequestFailed
from edgelora_runtime.serve.settings import is_loopback

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from edgelora_runtime.serve.settings import ServeSettings

HEALTH = "/health"
OLLAMA = "/api/"  # paths whose errors have Ollama's form
_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(:(?P<port>[0-9]{1,5}))?")
_PREFLIGHT = {
    "access-control-allow-methods": "GET, POST",
    "access-control-allow-headers": "authorization, content-type",
    "access-control-max-age": "600",
}


class Guard:
    """An ASGI application that lets through what has the right Host, Origin and key. Others get 403 or 401."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app = app
        self._settings = settings
        self._keys = [_digest(key) for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            host = self._check_host(headers.getlist("host"))
            origin = self._check_origin(headers.getlist("origin"), f"{scope['scheme']}://{host}")
            if origin is not None:
                send = _allow_origin(send, origin)
                if scope["method"] == "OPTIONS":
                    await Response(status_code=204, headers=_PREFLIGHT)(scope, receive, send)
                    return
            given = headers.getlist("authorization")
            if self._keys and scope["path"] != HEALTH and (given or not _is_page(scope["path"])):
                self._check_key(given)
        except RequestFailed as failed:
            await refuse(failed, scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_host(self, given: list[str]) -> str:
        """Returns the Host header, if it is one that this server has."""
        match = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        if match is None or not self._is_ours(match["name"].lower().removesuffix(".")):
            said = ", ".join(given)[:80] or "absent"
            raise RequestFailed(403, f"Host {said!r} is not this server's; allow its name with --allow-host", code="wrong_host")
        return given[0].lower()

    def _is_ours(self, name: str) -> bool:
        if name == "localhost" or name in {each.lower() for each in self._settings.names}:
            return True
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return address.is_loopback or not is_loopback(self._settings.host)

    def _check_origin(self, given: list[str], own: str) -> str | None:
        """Returns the origin of a foreign page that may call, None for the server's own pages and for programs."""
        if not given or given == [own]:
            return None
        if len(given) == 1 and given[0] in self._settings.origins:
            return given[0]
        said = ", ".join(given)[:80]
        raise RequestFailed(403, f"Origin {said!r} may not call this server; allow it with --allow-origin", code="wrong_origin")

    def _check_key(self, given: list[str]) -> None:
        scheme, _, key = (given[0] if len(given) == 1 else "").partition(" ")
        digest = _digest(key.strip())
        # Every key is compared, each in constant time, so that the time says nothing about any.
        matches = [hmac.compare_digest(digest, each) for each in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise RequestFailed(401, "no valid API key; send the header Authorization: Bearer KEY", code="invalid_api_key")


def _is_page(path: str) -> bool:
    """True for the chat page's own files. They hold no secret, and a browser that opens a page sends no key."""
    return path == "/" or path.startswith("/page/")


def refuse(failed: RequestFailed, path: str) -> Response:
    """Returns the response of a failure, in the form of the API that the path belongs to.

    The connection closes, as the rest of the request is not read.
    """
    content = failed.to_ollama() if path.startswith(OLLAMA) else failed.to_openai()
    closing = {"connection": "close"} if failed.status in (401, 403, 408, 413) else {}
    return JSONResponse(content, failed.status, {**failed.headers, **closing})


def _allow_origin(send: Send, origin: str) -> Send:
    async def send_with_origin(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["access-control-allow-origin"] = origin
            headers.append("vary", "Origin")
        await send(message)

    return send_with_origin


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
