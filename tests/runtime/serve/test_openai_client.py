"""The real `openai` client against a real server: answers are the runtime's own, and every failure is the client's error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jsonschema
import numpy as np
import openai
import pytest

from edgelora_runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.runtime.serve.servers import Server

MESSAGES: Any = [{"role": "user", "content": "the cat sat"}]
SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["cat", "dog"]}, "number": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["animal", "number"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def runtime(routed_bundle: Path) -> Iterator[Runtime]:
    with Runtime(routed_bundle, threads=1) as opened:
        yield opened


@pytest.mark.parametrize("model", ["base", "plain", "plain-live", "linear"])
def test_chat(client: openai.OpenAI, runtime: Runtime, model: str) -> None:
    expected = runtime.generate(MESSAGES, variant=model, max_tokens=8)
    answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8)
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.model == model
    extra: Any = answer.model_extra
    assert extra["receipt"]["variant"] == model
    assert extra["timings"]["predicted_n"] == len(expected.tokens)


def test_a_mix_is_a_model(client: openai.OpenAI, runtime: Runtime) -> None:
    mix = {"plain": 0.7, "rslora": -0.3}
    expected = runtime.generate(MESSAGES, mix=mix, max_tokens=8).text
    assert expected != runtime.generate(MESSAGES, variant="base", max_tokens=8).text
    named = client.chat.completions.create(model="plain:0.7+rslora:-0.3", messages=MESSAGES, max_tokens=8)
    adapters = [name for name, entry in runtime.bundle.manifest.adapters.items() if entry.file is not None]
    lora = [{"id": adapters.index(name), "scale": scale} for name, scale in mix.items()]
    given = client.chat.completions.create(model="plain-live", messages=MESSAGES, max_tokens=8, extra_body={"lora": lora})
    assert named.choices[0].message.content == given.choices[0].message.content == expected


def test_auto_is_the_routers_choice(client: openai.OpenAI, runtime: Runtime) -> None:
    messages: Any = [{"role": "user", "content": "a day in the sun, 7 of them"}]
    expected = runtime.generate(messages, variant="auto", max_tokens=8)
    assert expected.route is not None
    answer = client.chat.completions.create(model="auto", messages=messages, max_tokens=8)
    extra: Any = answer.model_extra
    assert answer.model == extra["route"]["variant"] == expected.route.variant == "other"
    assert answer.choices[0].message.content == expected.text


@pytest.mark.parametrize("given", ["a tool", "its result"])
def test_tools_do_not_change_the_routers_choice(client: openai.OpenAI, given: str) -> None:
    """This template knows no tools, so they and their results become text of the user's messages."""
    cats, days = "the cat number 77 sat", " ".join(f"a day in the sun, {number} of them" for number in range(20))
    function = {"name": "count", "description": days if given == "a tool" else "Counts."}
    tools: Any = [{"type": "function", "function": function}]
    messages: Any = [{"role": "user", "content": cats}]
    if given == "its result":
        call = {"id": "c", "type": "function", "function": {"name": "count", "arguments": "{}"}}
        messages += [{"role": "assistant", "content": None, "tool_calls": [call]}]
        messages += [{"role": "tool", "tool_call_id": "c", "content": days}]
    asked: Any = {"messages": messages, "tools": tools, "tool_choice": "none", "max_tokens": 4}
    answer = client.chat.completions.create(model="auto", **asked)
    extra: Any = answer.model_extra
    assert answer.model == extra["route"]["variant"] == "plain"
    assert answer.choices[0].message.content == client.chat.completions.create(model="plain", **asked).choices[0].message.content


def test_stream(client: openai.OpenAI, runtime: Runtime) -> None:
    options: Any = {"temperature": 0.9, "top_p": 0.9, "seed": 7, "max_tokens": 40}
    expected = [runtime.generate(MESSAGES, variant="plain", **{**options, "seed": seed}) for seed in (7, 8)]
    chunks = list(
        client.chat.completions.create(
            model="plain", messages=MESSAGES, n=2, stream=True, stream_options={"include_usage": True}, **options
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    *pieces, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == sum(len(each.tokens) for each in expected)
    assert last.usage.prompt_tokens == expected[0].prompt_tokens
    for index, each in enumerate(expected):
        deltas = [choice for chunk in pieces for choice in chunk.choices if choice.index == index]
        assert deltas[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in deltas) == each.text
        assert [choice.finish_reason for choice in deltas if choice.finish_reason] == [each.finish_reason]


def test_stream_ends_with_done(server: Server) -> None:
    response = server.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]


def test_stop_strings_and_several_answers(client: openai.OpenAI, runtime: Runtime) -> None:
    text = runtime.generate("the cat", variant="base", max_tokens=30).text
    stop = next(letter for letter in text[3:] if letter.isascii())
    expected = runtime.generate("the cat", variant="base", max_tokens=30, stop=[stop])
    answer = client.completions.create(model="base", prompt=["the cat", "the cat"], n=2, max_tokens=30, stop=stop)
    assert [choice.text for choice in answer.choices] == [expected.text] * 4
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2 * expected.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_completion_of_tokens(client: openai.OpenAI, runtime: Runtime, stream: bool) -> None:
    tokens = runtime.encode("the cat")
    expected = runtime.generate(tokens, variant="plain")
    if stream:
        pieces = client.completions.create(model="plain", prompt=tokens, max_tokens=64, stream=True)
        text = "".join(choice.text for piece in pieces for choice in piece.choices)
    else:
        text = client.completions.create(model="plain", prompt=tokens, max_tokens=64).choices[0].text
    assert text == expected.text


def test_logprobs(client: openai.OpenAI, runtime: Runtime) -> None:
    """Against a softmax in float64 over the logits of a plain pass."""
    answer = client.chat.completions.create(model="plain", messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=3)
    generation = runtime.generate(MESSAGES, variant="plain", max_tokens=6)
    prompt = runtime.encode(MESSAGES)
    logits = runtime.logits([*prompt, *generation.tokens], variant="plain").astype(np.float64)
    rated = answer.choices[0].logprobs
    assert rated is not None
    assert rated.content is not None
    assert len(rated.content) == len(generation.tokens)
    for at, (entry, token) in enumerate(zip(rated.content, generation.tokens, strict=True), len(prompt) - 1):
        likelihoods = np.exp(logits[at] - logits[at].max())
        expected = np.log(likelihoods / likelihoods.sum())
        assert entry.logprob == pytest.approx(expected[token], abs=1e-4)
        assert [each.logprob for each in entry.top_logprobs] == pytest.approx(np.sort(expected)[:-4:-1].tolist(), abs=1e-4)
        if entry.bytes is not None:
            assert bytes(entry.bytes).decode() == entry.token
    streamed = client.chat.completions.create(
        model="plain", messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=3, stream=True
    )
    found = [each for chunk in streamed for choice in chunk.choices if choice.logprobs for each in choice.logprobs.content or ()]
    assert [each.token for each in found] == [each.token for each in rated.content]


@pytest.mark.parametrize("kind", ["json_schema", "json_object"])
def test_structured_answers(client: openai.OpenAI, kind: str) -> None:
    form: Any = {"type": "json_object"}
    if kind == "json_schema":
        form = {"type": kind, "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(
        model="plain", messages=MESSAGES, response_format=form, max_tokens=400, temperature=1.0, seed=3
    )
    text = answer.choices[0].message.content
    assert text is not None
    if kind == "json_schema":
        assert answer.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(text), SCHEMA)
    else:
        assert text.lstrip().startswith("{")


def test_embeddings(client: openai.OpenAI, runtime: Runtime) -> None:
    texts = ["the cat", "a day in the sun"]
    found = client.embeddings.create(model="plain", input=texts)  # base64 on the wire, which is this client's default
    plain = client.embeddings.create(model="plain", input=texts, encoding_format="float")
    for text, each, other in zip(texts, found.data, plain.data, strict=True):
        expected = runtime.embed(text, variant="plain")
        np.testing.assert_allclose(each.embedding, expected, atol=1e-5)
        np.testing.assert_allclose(other.embedding, expected, atol=1e-5)
    assert found.usage.prompt_tokens == sum(len(runtime.encode(text)) for text in texts)


def test_models(client: openai.OpenAI, runtime: Runtime) -> None:
    models = {model.id: model for model in client.models.list()}
    assert models.keys() == {*runtime.variants, "auto"}
    extra: Any = models["linear-live"].model_extra
    assert extra["kind"] == "live"
    assert extra["mix"] == runtime.variants["linear-live"].live
    assert extra["parent"] == "base"
    assert (models["base"].model_extra or {})["parent"] is None
    mix: Any = client.models.retrieve("plain:0.5+rslora:0.5").model_extra
    assert mix["kind"] == "mix"
    assert mix["adapters"].keys() == {"plain", "rslora"}
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"content": "no role"}]}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}}, None, "invalid_value"),
        ({"messages": [{"role": "user", "content": "the cat " * 1000}]}, None, "invalid_value"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_400_that_names_it(client: openai.OpenAI, fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="base", messages=MESSAGES, extra_body=fields)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["type"] == "invalid_request_error"
    assert param is None or param in caught.value.body["message"]


def test_fields_that_ask_for_nothing_are_taken(client: openai.OpenAI, runtime: Runtime) -> None:
    """As clients send them that fill in every field."""
    nothing: dict[str, Any] = {
        "tools": [],
        "tool_choice": "none",
        "logit_bias": {},
        "presence_penalty": 0,
        "user": "me",
        "stop": None,
    }
    answer = client.chat.completions.create(model="base", messages=MESSAGES, max_tokens=8, extra_body=nothing)
    assert answer.choices[0].message.content == runtime.generate(MESSAGES, variant="base", max_tokens=8).text


@pytest.mark.parametrize("model", ["nobody", "plai", "auto2", "nobody:0.5", "other-bundle/base"])
def test_an_unknown_model_is_never_the_base(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=model, messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=model, input="x")


async def ask(url: str, count: int) -> list[str | None]:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=20) as client:
        models = ("base", "plain", "other", "plain:0.5+rslora:0.5")
        requests = (
            client.chat.completions.create(model=models[each % 4], messages=MESSAGES, max_tokens=8) for each in range(count)
        )
        return [answer.choices[0].message.content for answer in await asyncio.gather(*requests)]


def test_answers_do_not_depend_on_who_else_is_served(server: Server, runtime: Runtime) -> None:
    import asyncio

    alone = [runtime.generate(MESSAGES, variant=name, max_tokens=8).text for name in ("base", "plain", "other")]
    alone.append(runtime.generate(MESSAGES, mix={"plain": 0.5, "rslora": 0.5}, max_tokens=8).text)
    assert asyncio.run(ask(server.url, 16)) == alone * 4
