"""The real `ollama` client against a real server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import ollama
import pytest

from edgelora_runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.runtime.serve.servers import Server

MESSAGES: Any = [{"role": "user", "content": "the cat sat"}]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[ollama.Client]:
    with ollama.Client(server.url) as opened:
        yield opened


@pytest.fixture(scope="module")
def runtime(routed_bundle: Path) -> Iterator[Runtime]:
    with Runtime(routed_bundle, threads=1) as opened:
        yield opened


def test_chat(client: ollama.Client, runtime: Runtime) -> None:
    expected = runtime.generate(MESSAGES, variant="plain", max_tokens=8)
    answer = client.chat(model="plain:latest", messages=MESSAGES, options={"num_predict": 8, "num_ctx": 512})
    assert answer.message.content == expected.text
    assert answer.done
    assert answer.done_reason == expected.finish_reason
    assert (answer.prompt_eval_count, answer.eval_count) == (expected.prompt_tokens, len(expected.tokens))


def test_stream(client: ollama.Client, runtime: Runtime) -> None:
    options: Any = {"temperature": 0.8, "seed": 3, "num_predict": 20}
    expected = runtime.generate(MESSAGES, mix={"plain": 0.5, "rslora": 0.5}, temperature=0.8, seed=3, max_tokens=20)
    parts = list(client.chat(model="plain:0.5+rslora:0.5", messages=MESSAGES, options=options, stream=True))
    assert "".join(part.message.content or "" for part in parts) == expected.text
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]


def test_generate_uses_the_template_unless_it_is_raw(client: ollama.Client, runtime: Runtime) -> None:
    options: Any = {"num_predict": 8}
    chat = [{"role": "system", "content": "one"}, {"role": "user", "content": "the cat"}]
    answer = client.generate(model="base", prompt="the cat", system="one", options=options)
    assert answer.response == runtime.generate(chat, variant="base", max_tokens=8).text
    raw = client.generate(model="base", prompt="the cat", raw=True, options=options)
    assert raw.response == runtime.generate("the cat", variant="base", max_tokens=8).text


def test_formats(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    answer = client.chat(model="plain", messages=MESSAGES, format=schema, options={"num_predict": 200})
    assert json.loads(answer.message.content or "")["n"] in (1, 2)
    assert client.chat(model="plain", messages=MESSAGES, format="json", options={"num_predict": 20}).message.content


def test_embed_and_list(client: ollama.Client, runtime: Runtime) -> None:
    found = client.embed(model="plain", input=["the cat"]).embeddings
    np.testing.assert_allclose(found[0], runtime.embed("the cat", variant="plain"), atol=1e-5)
    assert {model.model for model in client.list().models} == {*runtime.variants, "auto"}


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (404, {"model": "nobody"}),
        (400, {"options": {"num_ctx": 1 << 20}}),
        (400, {"options": {"mirostat": 2}}),
        (400, {"options": {"num_predict": 0}}),
        (400, {"tools": [{"type": "function", "function": {"name": "no name"}}]}),
    ],
)
def test_failures(client: ollama.Client, status: int, fields: dict[str, Any]) -> None:
    with pytest.raises(ollama.ResponseError) as caught:
        client.chat(**{"model": "base", "messages": MESSAGES, **fields})
    assert caught.value.status_code == status
    assert caught.value.error
