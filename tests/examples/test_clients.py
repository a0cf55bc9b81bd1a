"""The examples that talk to a server, each in an environment of its own where its packages are not ours, as its users run it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai
import pytest

from tests.environments import peer_python
from tests.runtime.serve.servers import Server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RUNTIME = ("onnxruntime", "tokenizers", "safetensors", "jinja2", "typer", "prometheus-client", "jsonschema", "llguidance")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(bundle32: Path) -> Iterator[Server]:
    with Server(bundle32) as started:
        yield started


def run(example: str, server: Server, *arguments: str, python: Path | str = sys.executable) -> str:
    """What an example prints."""
    environment = {**os.environ, "EDGELORA_URL": server.url}
    command = [str(python), str(EXAMPLES / f"{example}.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(server: Server, text: str, **fields: object) -> str:
    """What the server answers to a message."""
    said: str = server.chat(**fields, messages=[{"role": "user", "content": text}]).json()["choices"][0]["message"]["content"]  # type: ignore[arg-type]
    return said


def test_openais_client(server: Server) -> None:
    said = run("openai_client", server, "plain", "plain=0.5", "rslora=0.25")
    expected = ask(server, "Name a city.", model="plain", max_tokens=40)
    assert f"plain: {expected}" in said
    assert "is_capital" in said
    assert ask(server, "Name a city.", model="plain:0.5+rslora:0.25", max_tokens=40) in said


def test_the_agent_calls_its_tool(server: Server) -> None:
    said = run("agent", server, "base")
    assert 'count_stock({"fruit": "' in said.replace("'", '"')
    assert '"count": ' in said


@pytest.mark.parametrize(
    ("example", "package"), [("langchain_chat", "langchain-openai"), ("llama_index_chat", "llama-index-llms-openai-like")]
)
def test_frameworks(server: Server, example: str, package: str) -> None:
    python = peer_python(example.partition("_chat")[0].replace("_", "-"), [package])
    said = run(example, server, "plain", python=python)
    kind, tokens = ("answer", 120) if example == "langchain_chat" else ("chat", 40)
    expected = ask(server, "Say hello.", model="plain", max_tokens=tokens)
    assert f"{kind}: {expected}" in said
    assert f"stream: {expected}" in said
    assert example != "langchain_chat" or " degrees" in said


def wait_until_ready(url: str, process: subprocess.Popen[str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "Ray Serve ended"
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise AssertionError("Ray Serve did not start")


def start_ray(python: Path, bundle: Path, folder: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join(map(str, (EXAMPLES, ROOT, ROOT / "export", ROOT / "runtime")))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "BUNDLE": str(bundle),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # its default of 5 is too short for a busy machine
    }
    command = [str(python.parent / "serve"), "run", "ray_serve:app"]
    with (folder / "ray.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, text=True)


def list_replicas(url: str, models: Sequence[str]) -> dict[str, set[str]]:
    """The replicas that answered for each model, asked several times."""
    found: dict[str, set[str]] = {model: set() for model in models}
    for model in [*models] * 6:
        headers = {"serve_multiplexed_model_id": model}
        body = {"model": model, "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 4}
        response = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        assert response.status_code == 200, response.text
        found[model].add(response.headers["x-replica"])
    return found


def test_two_replicas_behind_ray_serve(server: Server, bundle32: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each variant stays with a replica that has it, answers are the server's own, and a stream is one."""
    python = peer_python("ray-serve", ["ray[serve]", *RUNTIME])
    url = "http://127.0.0.1:8000"
    process = start_ray(python, bundle32, tmp_path_factory.mktemp("ray"))
    try:
        wait_until_ready(url, process)
        found = list_replicas(url, ["base", "plain", "plain-live"])
        assert all(len(replicas) == 1 for replicas in found.values()), found
        assert len(set.union(*found.values())) == 2, found
        with openai.OpenAI(
            base_url=f"{url}/v1", api_key="unused", default_headers={"serve_multiplexed_model_id": "plain"}
        ) as client:
            said = client.chat.completions.create(
                model="plain", messages=[{"role": "user", "content": "the cat"}], max_tokens=20, stream=True
            )
            assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == ask(
                server, "the cat", model="plain", max_tokens=20
            )
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
