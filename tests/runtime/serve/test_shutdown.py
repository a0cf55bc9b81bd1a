"""SIGTERM and Ctrl-C: requests finish or are cut at the deadline, new ones get 503, and no process stays."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.runtime.serve.servers import LONG, Server

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as POSIX sends them")


def read_stream(server: Server, begun: threading.Event, lines: list[str], **fields: Any) -> None:
    """Reads a long stream into lines, however it ends."""
    body = {"model": "plain", "prompt": "the cat", "stream": True, **LONG, **fields}
    try:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
            for line in response.iter_lines():
                if line:
                    lines.append(line)
                    begun.set()
    except httpx.HTTPError as error:
        lines.append(f"broken: {error}")


@pytest.mark.parametrize("round_", [*range(10), *(pytest.param(more, marks=pytest.mark.slow) for more in range(10, 50))])
def test_sigterm_in_the_middle_of_a_stream(routed_bundle: Path, round_: int) -> None:
    """The stream ends with an error that says why, the process with one line, and its port is free."""
    lines: list[str] = []
    begun = threading.Event()
    with Server(routed_bundle, "--drain", 0.2) as server:
        reader = threading.Thread(target=read_stream, args=(server, begun, lines))
        reader.start()
        assert begun.wait(20)
        time.sleep(0.03 * (round_ % 17))
        server.process.send_signal(signal.SIGTERM if round_ % 2 else signal.SIGINT)
        started = time.monotonic()
        code = server.process.wait(timeout=30)
        assert time.monotonic() - started < 15  # on a busy machine; the whole answer would take longer
        reader.join(10)
        assert not reader.is_alive()
        assert server.process.stderr is not None
        said = server.process.stderr.read().splitlines()
    assert code == (143 if round_ % 2 else 130)
    assert said[1:] == ["edgelora: terminated" if round_ % 2 else "edgelora: interrupted"]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_admitted_requests_finish_and_new_ones_get_503(routed_bundle: Path) -> None:
    with Server(routed_bundle) as server:
        answers: list[list[str]] = [[], []]
        begun = threading.Event()
        readers = [threading.Thread(target=read_stream, args=(server, begun, lines), kwargs={"n": 4}) for lines in answers]
        for reader in readers:
            reader.start()
        assert begun.wait(20)
        while server.figure("edgelora_held_requests") < 2:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        while (health := server.client.get("/health")).status_code == 200:
            time.sleep(0.01)
        assert health.json() == {"status": "ending"}
        refused = server.chat()
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        for reader in readers:
            reader.join(30)
        assert [lines[-1] for lines in answers] == ["data: [DONE]"] * 2
        assert server.process.wait(timeout=20) == 143


def test_a_second_signal_cuts_at_once(routed_bundle: Path) -> None:
    lines: list[str] = []
    begun = threading.Event()
    with Server(routed_bundle, "--drain", 30) as server:
        reader = threading.Thread(target=read_stream, args=(server, begun, lines))
        reader.start()
        assert begun.wait(20)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=20) == 130  # not 30 seconds
        reader.join(10)
    assert "shutting_down" in lines[-1]


def test_an_idle_server_ends_at_once(routed_bundle: Path) -> None:
    with Server(routed_bundle) as server:
        assert server.client.get("/health").status_code == 200  # its connection stays open
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=30) == 143
        assert time.monotonic() - started < 15  # it does not wait for the time that requests would have
