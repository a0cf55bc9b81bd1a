"""/v1/responses with the real `openai` client."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest

from edgelora_runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.runtime.serve.servers import Server

CHAT: Any = [{"role": "system", "content": "one"}, {"role": "user", "content": "the cat sat"}]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(routed_bundle: Path) -> str:
    with Runtime(routed_bundle, threads=1) as runtime:
        return runtime.generate(CHAT, variant="plain", max_tokens=16).text


def test_text_and_messages(client: openai.OpenAI, expected: str) -> None:
    answer = client.responses.create(model="plain", input="the cat sat", instructions="one", max_output_tokens=16)
    assert answer.output_text == expected
    assert answer.status in ("completed", "incomplete")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    parts: Any = [
        {"role": "developer", "content": "one"},
        {"role": "user", "content": [{"type": "input_text", "text": "the cat sat"}]},
    ]
    assert client.responses.create(model="plain", input=parts, max_output_tokens=16).output_text == expected


def test_stream(client: openai.OpenAI, expected: str) -> None:
    events = list(
        client.responses.create(model="plain", input="the cat sat", instructions="one", max_output_tokens=16, stream=True)
    )
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last: Any = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == expected


def test_the_clients_own_helper_reads_a_stream(client: openai.OpenAI) -> None:
    schema = {"enum": ["cat", "dog"]}
    form: Any = {"format": {"type": "json_schema", "name": "pet", "schema": schema}}
    with client.responses.stream(model="plain", input="the cat", text=form) as stream:
        stream.until_done()
        assert json.loads(stream.get_final_response().output_text) in schema["enum"]


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    assert json.loads(client.responses.create(model="plain", input="the cat", text=form).output_text)["n"] in (1, 2)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"previous_response_id": "resp_1"}, "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "invalid_value"),
        ({"reasoning": {"effort": "low"}}, "unsupported_parameter"),
    ],
)
def test_what_needs_state_or_other_tools_is_named(client: openai.OpenAI, fields: dict[str, Any], code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="plain", input="x", extra_body=fields)
    assert (caught.value.param, caught.value.code) == (next(iter(fields)), code)
