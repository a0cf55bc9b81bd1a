"""Attacks by the body of a request to a server, which runs in this process, without a socket."""

from __future__ import annotations

import asyncio
import json
from functools import cache
from typing import TYPE_CHECKING, Any

from edgelora_runtime import Bundle, InputError, Runtime
from tests.attacks.attack import Attack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import httpx

CHAT, PLAIN, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = [{"role": "user", "content": "hi"}]
GOOD = {"model": "base", "messages": HELLO, "max_tokens": 2}
DEEP = b'{"model":"base","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def chat(**fields: Any) -> tuple[str, bytes]:
    return CHAT, json.dumps({**GOOD, **fields}).encode()


def message(**fields: Any) -> tuple[str, bytes]:
    return chat(messages=[{"role": "user", "content": "hi", **fields}])


BODIES: dict[str, tuple[str, bytes]] = {
    "empty": (CHAT, b""),
    "no JSON": (CHAT, b"{"),
    "a list": (CHAT, b"[]"),
    "not UTF-8": (CHAT, b"\xff\xfe{}"),
    "a hundred thousand brackets": (CHAT, DEEP),
    "2 MiB": (CHAT, b" " * (2 << 20)),
    "a number of a million digits": (CHAT, b'{"model":"base","max_tokens":' + b"9" * 1_000_000 + b"}"),
    "no model of this name": chat(model="nobody\x1b[2J\n"),
    "a model in a parent folder": chat(model="../../etc/passwd"),
    "a model that is a list": chat(model=["base"]),
    "a mix of an absent adapter": chat(model="base+nobody:1"),
    "no messages": chat(messages=[]),
    "messages that are text": chat(messages="hi"),
    "a message that is a number": chat(messages=[7]),
    "a message without a role": chat(messages=[{"content": "hi"}]),
    "content that is a number": message(content=7),
    "content of lone surrogates": message(content="\ud800"),
    "a parameter of half a surrogate pair": chat(**{"a\ud800": 1}),
    "content of another kind": message(content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
    "content longer than the context": message(content="the cat " * 100_000),
    "tokens below zero": chat(max_tokens=-1),
    "tokens of 2^70": chat(max_tokens=1 << 70),
    "tokens as text": chat(max_tokens="2"),
    "a temperature of NaN": (CHAT, json.dumps(GOOD).encode()[:-1] + b', "temperature": NaN}'),
    "a temperature of 1e400": (CHAT, json.dumps(GOOD).encode()[:-1] + b', "temperature": 1e400}'),
    "a temperature below zero": chat(temperature=-1),
    "a thousand answers": chat(n=1000),
    "biases that are text": chat(logit_bias={"5": "x"}),
    "a bias of a token past the vocabulary": chat(logit_bias={"99999999": 1}),
    "stop strings of numbers": chat(stop=[7]),
    "a thousand stop strings": chat(stop=["x"] * 1000),
    "tools that are text": chat(tools="x"),
    "a tool without a name": chat(tools=[{"type": "function", "function": {}}]),
    "a form that is none": chat(response_format={"type": "evil\n"}),
    "a schema that is none": chat(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "evil"}}}
    ),
    "log probabilities of a million": chat(logprobs=True, top_logprobs=1_000_000),
    "a prompt of a token past the vocabulary": (PLAIN, b'{"model":"base","prompt":[99999999]}'),
    "a prompt of a token below zero": (PLAIN, b'{"model":"base","prompt":[-1]}'),
    "a prompt of mixed kinds": (PLAIN, b'{"model":"base","prompt":["a",1]}'),
    "no prompt": (PLAIN, b'{"model":"base"}'),
    "an input that is a number": (EMBED, b'{"model":"base","input":7}'),
}


@cache
def build(bundle: Path) -> Any:
    """The application over one bundle, once in a process."""
    from edgelora_runtime.serve.app import build_app
    from edgelora_runtime.serve.service import Service
    from edgelora_runtime.serve.settings import ServeSettings

    return build_app(Service({"bundle": Runtime(bundle, threads=1)}, ServeSettings()))


def ask(bundle: Path, path: str, body: bytes) -> httpx.Response:
    """Sends a body to the application over a bundle."""
    import httpx

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=build(bundle))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post(path, content=body, headers={"Content-Type": "application/json"})

    return asyncio.run(send())


def post(bundle: Path, path: str, body: bytes) -> Callable[[Path], None]:
    """Sends a body, and raises the server's own words where it refuses it as a client's mistake."""

    def send(folder: Path) -> None:
        response = ask(bundle, path, body)
        if not 400 <= response.status_code < 500:
            raise RuntimeError(f"the server answered with status {response.status_code}: {response.text[:200]}")
        said = response.json()["error"]["message"]
        if not said.isprintable():
            raise RuntimeError(f"the server's message has control characters: {said[:200]!a}")
        raise InputError(f"{response.status_code}: {said}")

    return send


def list_attacks(bundle: Path) -> Iterator[Attack]:
    """Each body names the bundle's own default variant where the ones above say base."""
    variant = json.dumps(Bundle.open(bundle).manifest.default_variant).encode()
    for name, (path, written) in BODIES.items():
        body = written.replace(b'"base"', variant)
        yield Attack("request", name, lambda folder: None, post(bundle, path, body))
