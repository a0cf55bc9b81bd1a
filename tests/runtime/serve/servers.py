"""A real server in a process of its own, as `edgelora serve` starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

ROOT = Path(__file__).resolve().parents[3]
LONG = {"max_tokens": 900, "ignore_eos": True, "n": 16}  # an answer that lasts for seconds, even of a tiny model


class Server:
    """`edgelora serve` with a free port, from the block's start to its end."""

    def __init__(self, bundle: Path | str, *options: object) -> None:
        self._command = [
            *(sys.executable, "-m", "edgelora", "serve", bundle, "--port", 0, "--threads", 1, "--json"),
            *options,
        ]

    def __enter__(self) -> Self:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
        self.process = subprocess.Popen(
            list(map(str, self._command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate()[1])
        self.url: str = json.loads(line)["url"]
        self.port = int(self.url.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.url, timeout=60)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise

    def chat(self, model: str = "base", **fields: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4, **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def figure(self, name: str) -> float:
        """A figure of /metrics, summed over its labels."""
        lines = self.client.get("/metrics").text.splitlines()
        found = [float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        assert found, name
        return sum(found)

    def wait_until_idle(self, seconds: float = 1.0) -> float:
        """Seconds until no request holds a place. Fails after so many."""
        started = time.monotonic()
        while self.figure("edgelora_held_requests"):
            assert time.monotonic() - started < seconds, "requests still hold places"
            time.sleep(0.01)
        return time.monotonic() - started
