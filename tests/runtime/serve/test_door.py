"""The door: which Host, Origin and key get in, over a real socket, where no client library tidies headers up."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from edgelora_runtime.errors import InputError, UsageError
from edgelora_runtime.serve.settings import ServeSettings, read_keys
from tests.runtime.serve.servers import Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = "a-key-of-many-letters"


def send(port: int, *lines: str, path: str = "/v1/models", method: str = "GET") -> tuple[int, str]:
    """Status and text of the answer to a request with these header lines, and no others."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        request = "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "Connection: close", "", ""])
        connection.sendall(request.encode("latin-1"))
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    return int(answer.split(b" ", 2)[1]), answer.decode("latin-1")


@pytest.mark.parametrize(
    ("status", "host", "origin"),
    [
        (200, "127.0.0.1:PORT", None),
        (200, "localhost:PORT", None),
        (200, "LOCALHOST", None),
        (200, "[::1]:PORT", None),
        (200, "127.0.0.1", None),
        (403, "evil.example", None),
        (403, "evil.example:PORT", None),
        (403, "localhost.evil.example:PORT", None),
        (403, "127.0.0.1.evil.example:PORT", None),
        (403, "127.0.0.1@evil.example", None),
        (403, "192.168.1.7:PORT", None),
        (403, "0.0.0.0:PORT", None),
        (403, "2130706433:PORT", None),
        (403, "", None),
        (200, "localhost:PORT", "http://localhost:PORT"),
        (200, "127.0.0.1:PORT", "http://127.0.0.1:PORT"),
        (403, "localhost:PORT", "http://localhost:3000"),
        (403, "localhost:PORT", "https://localhost:PORT"),
        (403, "localhost:PORT", "http://evil.example"),
        (403, "localhost:PORT", "null"),
        (403, "localhost:PORT", "*"),
        (403, "evil.example:PORT", "http://evil.example:PORT"),
    ],
)
def test_hosts_and_origins(server: Server, status: int, host: str, origin: str | None) -> None:
    lines = [f"Host: {host}", *([] if origin is None else [f"Origin: {origin}"])]
    found, text = send(server.port, *(line.replace("PORT", str(server.port)) for line in lines))
    assert found == status, text
    assert "access-control" not in text.lower()
    assert status == 200 or "plain" not in text


def test_two_hosts_or_none_are_refused(server: Server) -> None:
    assert send(server.port, "Host: localhost", "Host: localhost")[0] in (400, 403)
    assert send(server.port)[0] in (400, 403)


def test_a_preflight_of_a_foreign_page_gets_nothing(server: Server) -> None:
    status, text = send(server.port, "Host: localhost", "Origin: http://evil.example", method="OPTIONS")
    assert status == 403
    assert "access-control" not in text.lower()


@pytest.fixture(scope="module")
def locked(routed_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# ours\n\n{KEY}\nanother-key-of-letters\n", encoding="utf-8")
    options = ("--api-key-file", keys, "--allow-host", "box.example", "--allow-origin", "https://app.example")
    with Server(routed_bundle, "--host", "0.0.0.0", *options) as started:
        yield started


PATHS = (
    "/v1/models",
    "/v1/models/base",
    "/v1/chat/completions",
    "/metrics",
    "/openapi.json",
    "/api/tags",
    "/lora-adapters",
    "/nope",
)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("given", ["", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer", f"Bearer {KEY[:-1]}", KEY])
def test_a_wrong_key_sees_nothing(locked: Server, path: str, given: str) -> None:
    """The answer does not even say which paths there are."""
    status, text = send(locked.port, "Host: localhost", *([f"Authorization: {given}"] if given else []), path=path)
    assert status == 401
    assert "www-authenticate: bearer" in text.lower()
    body = text.partition("\r\n\r\n")[2]
    assert "no valid API key" in body
    assert "plain" not in body
    assert KEY not in body


def test_a_right_key_sees_all_and_health_needs_none(locked: Server) -> None:
    assert send(locked.port, "Host: localhost", f"Authorization: Bearer {KEY}")[0] == 200
    assert send(locked.port, "Host: localhost", "Authorization: bearer another-key-of-letters")[0] == 200
    status, text = send(locked.port, "Host: localhost", path="/health")
    assert status == 200
    assert text.partition("\r\n\r\n")[2].strip() == '{"status":"ok"}'


def test_names_and_pages_that_were_allowed(locked: Server) -> None:
    key = f"Authorization: Bearer {KEY}"
    assert send(locked.port, "Host: box.example:1", key)[0] == 200
    assert send(locked.port, "Host: 192.168.1.7", key)[0] == 200  # it listens there as well
    assert send(locked.port, "Host: evil.example", key)[0] == 403
    status, text = send(locked.port, "Host: box.example", "Origin: https://app.example", key)
    assert status == 200
    assert "access-control-allow-origin: https://app.example" in text
    assert send(locked.port, "Host: box.example", "Origin: https://app.example", method="OPTIONS")[0] == 204
    assert send(locked.port, "Host: box.example", "Origin: https://app.example")[0] == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.com"])
def test_other_addresses_need_keys(host: str) -> None:
    with pytest.raises(UsageError, match="--api-key-file"):
        ServeSettings(host=host)
    ServeSettings(host=host, keys=frozenset([KEY]))


@pytest.mark.parametrize("text", ["", "# only a comment\n", "short\n", "with a blank in the key\n", "with-ünicode-letters\n"])
def test_key_files_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="--api-key-file") as caught:
        read_keys(tmp_path / "keys")
    assert "blank in" not in str(caught.value)  # no message quotes a key
