"""Bodies that are too large, too slow, or no JSON object: each is refused in time, and the server goes on."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.runtime.serve.servers import Server

if TYPE_CHECKING:
    from collections.abc import Iterator

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/api/chat", "/api/generate", "/api/embed")


@pytest.fixture(scope="module")
def hasty(routed_bundle: Path) -> Iterator[Server]:
    with Server(routed_bundle, "--body-timeout", 0.5, "--max-body", 4096) as started:
        yield started


def read_memory(server: Server) -> int:
    """The resident bytes of the server's process."""
    pages = Path(f"/proc/{server.process.pid}/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * 4096


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_states_a_large_size(hasty: Server, path: str) -> None:
    response = hasty.client.post(path, content=b"x" * 5000)
    assert response.status_code == 413
    assert "4096" in response.text


def test_a_large_body_without_a_stated_size_is_not_buffered(hasty: Server) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * (1 << 20)

    before = read_memory(hasty)
    started = time.monotonic()
    assert hasty.client.post("/v1/completions", content=parts()).status_code == 413
    assert time.monotonic() - started < 5
    assert read_memory(hasty) - before < 10 << 20


def test_a_slow_body_ends_in_time(hasty: Server) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000\r\n\r\n")
        started = time.monotonic()
        connection.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() - started < 5:
            connection.sendall(b" ")  # never long without a byte
            try:
                answer = connection.recv(1 << 16)
            except TimeoutError:
                continue
    assert answer.split(b" ", 2)[1] == b"408"
    assert time.monotonic() - started < 3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows stops no process")
def test_a_body_that_came_while_the_server_was_stopped_is_read(hasty: Server) -> None:
    """A busy or suspended machine is no slow client."""
    body = b'{"model": "base", "prompt": "the cat", "max_tokens": 2}'
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=10) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode())
        time.sleep(0.2)  # the server waits for the body
        hasty.process.send_signal(signal.SIGSTOP)
        try:
            connection.sendall(body)
            time.sleep(1)
        finally:
            hasty.process.send_signal(signal.SIGCONT)
        assert connection.recv(1 << 16).split(b" ", 2)[1] == b"200"


@pytest.mark.slow
def test_slow_headers_end_in_time(hasty: Server) -> None:
    from edgelora_runtime.serve.protocol import HEADER_TIMEOUT

    with socket.create_connection(("127.0.0.1", hasty.port), timeout=HEADER_TIMEOUT + 5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        started = time.monotonic()
        assert connection.recv(1024) == b""
    assert HEADER_TIMEOUT - 1 < time.monotonic() - started < HEADER_TIMEOUT + 4


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "base", "model": "plain", "prompt": "x"}',
        b'{"model": "base", "prompt": "x", "temperature": NaN}',
        b'{"model": "base", "prompt": "\\ud800"}',
        b'{"model": "base", "prompt": "x", "\\uD800": 1}',
        b'{"model": "\\udc00", "prompt": "x"}',
        b'{"a":' * 600 + b"1" + b"}" * 600,
        b"[" * 4000,
        b'{"model": "base", "prompt": "x", "seed": ' + b"9" * 4000 + b"}",
        b'{"model": "base", "prompt": "x", "temperature": 1e999}',
    ],
)
def test_what_is_no_request_is_a_400(hasty: Server, body: bytes) -> None:
    response = hasty.client.post("/v1/completions", content=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert json.loads(hasty.client.post("/api/generate", content=body).text)["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("GET", "/x", 404)]
)
def test_other_paths_and_methods(hasty: Server, method: str, path: str, status: int) -> None:
    response = hasty.client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_the_server_still_answers(hasty: Server) -> None:
    assert hasty.chat().status_code == 200
    hasty.wait_until_idle()
