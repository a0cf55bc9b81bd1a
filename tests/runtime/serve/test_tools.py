"""Tools through the server, with the real clients, in each family's own form of calls, and thoughts split from answers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jsonschema
import openai
import pytest

from edgelora_runtime import Runtime
from edgelora_runtime.serve.api.ollama import ChatAnswer
from edgelora_runtime.serve.api.turns import Formats, Turn
from edgelora_runtime.serve.names import ModelChoice
from tests.runtime.serve.servers import Server
from tests.runtime.tools import families
from tests.runtime.tools.formats import TEMPLATES, USER, make_marked_base
from tests.runtime.tools.test_grammars import NAMED, SCHEMA, TOOLS
from tests.tiny import export_base

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FAMILIES = ["qwen2_5", "qwen3_vl", "llama3_1", "lfm2_v2", "mistral-list", "mistral-ids", "hermes", "smollm3", "smollm2"]
FAMILIES = [name for name in FAMILIES if name in TEMPLATES]
# A template that opens a thought itself, as those of models that always think do.
THINKER = (
    "{% for m in messages %}{{ m.role }}: {% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking != false %}<think>\n{% endif %}{% endif %}"
)
MESSAGES: Any = [USER]
CUT_OFF = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": '{"ci'}}],
}
TOOLS_GIVEN: Any = TOOLS
SAMPLED: Any = {"max_tokens": 600, "temperature": 1.0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that has the marks of all families as tokens, and the template of each by its name."""
    folder = tmp_path_factory.mktemp("tools")
    make_marked_base(folder / "base")
    named = folder / "base" / "additional_chat_templates"
    named.mkdir()
    for name, template in {
        **{name: TEMPLATES[name] for name in FAMILIES},
        "granite-4": families.GRANITE_4,
        "thinker": THINKER,
    }.items():
        (named / f"{name}.jinja").write_text(template, encoding="utf-8")
    export_base(folder / "base", folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> Iterator[Runtime]:
    with Runtime(bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[openai.OpenAI]:
    with Server(bundle) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as opened:
        yield opened


def name_template(name: str, **more: Any) -> dict[str, Any]:
    return {"chat_template_kwargs": {"chat_template": name, **more}}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_goes_round(client: openai.OpenAI, name: str) -> None:
    """A required call, streamed the same, and its result in the next request."""
    asked: Any = {"model": "base", "tools": TOOLS_GIVEN, "extra_body": name_template(name), "seed": 5, **SAMPLED}
    options: Any = {**asked, "tool_choice": NAMED, "parallel_tool_calls": False}
    (choice,) = client.chat.completions.create(messages=MESSAGES, **options).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "find"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    with client.chat.completions.stream(messages=MESSAGES, **options) as stream:
        stream.until_done()
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert [each.function.arguments for each in streamed.message.tool_calls or ()] == [call.function.arguments]
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "a cat was seen"}
    after = client.chat.completions.create(
        messages=[*MESSAGES, choice.message.to_dict(), result], tool_choice="none", **{**asked, "max_tokens": 8}
    )
    assert after.usage is not None
    before = client.chat.completions.create(messages=MESSAGES, tool_choice="none", **{**asked, "max_tokens": 8}).usage
    assert before is not None
    assert after.usage.prompt_tokens > before.prompt_tokens + len("find")
    assert after.choices[0].message.tool_calls is None


def test_several_calls_stream_by_index(client: openai.OpenAI) -> None:
    asked: Any = {"model": "base", "messages": MESSAGES, "tools": TOOLS_GIVEN, "tool_choice": "required", **SAMPLED}
    asked |= {"extra_body": name_template("hermes"), "n": 2, "seed": 3, "logit_bias": {"1": -5}}
    whole = client.chat.completions.create(**asked)
    calls: list[dict[int, list[str]]] = [{}, {}]
    for chunk in client.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            for each in choice.delta.tool_calls or ():
                found = calls[choice.index].setdefault(each.index, ["", ""])
                assert each.function is not None
                assert (each.id is None) == bool(found[0])  # the first piece of a call has its id and name
                found[0] += each.function.name or ""
                found[1] += each.function.arguments or ""
    expected = [
        [[call.function.name, call.function.arguments] for call in choice.message.tool_calls or ()] for choice in whole.choices
    ]
    assert [list(each.values()) for each in calls] == expected
    assert all(expected)


@pytest.mark.parametrize("stream", [False, True])
def test_responses_call_functions(client: openai.OpenAI, stream: bool) -> None:
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS_GIVEN]
    asked: Any = {"model": "base", "tools": tools, "extra_body": {**name_template("hermes"), "seed": 4}}
    options: Any = {**asked, "tool_choice": {"type": "function", "name": "find"}, "max_output_tokens": 600, "temperature": 1.0}
    if stream:
        with client.responses.stream(input="Find it.", **options) as opened:
            kinds = [event.type for event in opened]
            answer: Any = opened.get_final_response()
        assert kinds.count("response.function_call_arguments.done") == 1
        assert kinds[-1] == "response.completed"
    else:
        answer = client.responses.create(input="Find it.", **options)
    (call,) = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "find", "completed")
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    said: Any = [
        {"role": "user", "content": "Find it."},
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "a cat was seen"},
    ]
    after = client.responses.create(input=said, tool_choice="none", max_output_tokens=8, **asked)
    assert after.usage is not None
    assert after.usage.input_tokens > answer.usage.input_tokens
    assert [item.type for item in after.output] == ["message"]


def feed(answer: ChatAnswer, text: str) -> list[dict[str, Any]]:
    """The messages that an answer makes of a text that comes in pieces of three characters."""
    pieces = [answer.push(text[at : at + 3]) for at in range(0, len(text), 3)]
    return [part["message"] for part in [*pieces, answer.finish()]]


def test_ollamas_calls_come_whole(runtime: Runtime) -> None:
    """Text, two calls, and one that was cut off."""
    turn = Turn(Formats(), runtime, ModelChoice("base", "bundle", "base"), TOOLS)
    turn.fit([[USER]], [{"template_options": {"chat_template": "hermes"}}])
    one, two = (
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "find", "arguments": {"city": "Ro',
    )
    messages = feed(ChatAnswer(turn), f"Well.\n{one}\n{one}\n{two}")
    assert "".join(message["content"] for message in messages).strip() == "Well."
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    assert calls == [{"function": {"name": "now", "arguments": {}}}] * 2


def find_thought(runtime: Runtime) -> tuple[dict[str, Any], str, str]:
    """Options with which the tiny model ends its thought in the middle, and what it then thinks and says."""
    ending = runtime.tokenizer.added_tokens["</think>"]
    for seed in range(200):
        options: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "seed": seed, "logit_bias": {ending: 4.0}}
        raw = runtime.generate([USER], template_options={"chat_template": "thinker"}, **options).text
        thought, mark, text = raw.partition("</think>")
        if mark and thought.strip() and text.strip() and "</think>" not in text:
            return {**options, "logit_bias": {str(ending): 4.0}}, thought.strip(), text.lstrip()
    raise AssertionError("no seed ends a thought")


def test_thoughts_are_split_from_answers(client: openai.OpenAI, runtime: Runtime) -> None:
    """The template opens the thought, so the answer starts within it."""
    options, thought, text = find_thought(runtime)
    asked: Any = {"model": "base", "messages": MESSAGES, "extra_body": name_template("thinker"), **options}
    message: Any = client.chat.completions.create(**asked).choices[0].message
    assert message.reasoning_content == thought
    assert message.content == text
    deltas: list[Any] = [
        choice.delta for chunk in client.chat.completions.create(stream=True, **asked) for choice in chunk.choices
    ]
    assert "".join((delta.model_extra or {}).get("reasoning_content") or "" for delta in deltas) == thought
    assert "".join(delta.content or "" for delta in deltas) == text
    answer: Any = client.responses.create(
        model="base",
        input=[USER],  # type: ignore[list-item]
        max_output_tokens=40,
        temperature=1.0,
        extra_body={**name_template("thinker"), "seed": options["seed"], "logit_bias": options["logit_bias"]},
    )
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.output[0].content[0].text == thought
    assert answer.output_text == text


def test_the_templates_own_switch_is_passed_on(client: openai.OpenAI, runtime: Runtime) -> None:
    """Without a thought opened, the same text is all answer."""
    template = {"chat_template": "thinker", "enable_thinking": False}
    expected = runtime.generate([USER], template_options=template, max_tokens=12).text
    message: Any = (
        client.chat.completions.create(
            model="base", messages=MESSAGES, max_tokens=12, extra_body=name_template("thinker", enable_thinking=False)
        )
        .choices[0]
        .message
    )
    assert message.content == expected
    assert not hasattr(message, "reasoning_content")


def test_a_schema_leaves_room_for_a_thought(client: openai.OpenAI, runtime: Runtime) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": {"enum": ["cat", "dog"]}}}
    ending = str(runtime.tokenizer.added_tokens["</think>"])
    answer = client.chat.completions.create(
        model="base", messages=MESSAGES, response_format=form, extra_body=name_template("thinker"), logit_bias={ending: 6},
        temperature=1.0, seed=1, max_tokens=200,
    )  # fmt: skip
    assert json.loads(answer.choices[0].message.content or "") in ("cat", "dog")


def test_log_probabilities_come_with_their_chunks(client: openai.OpenAI) -> None:
    asked: Any = {"model": "base", "messages": MESSAGES, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    counts, tokens = [], []
    for chunk in client.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            found = (choice.logprobs.content if choice.logprobs else None) or []
            counts.append(len(found))
            tokens += [(each.token, each.logprob) for each in found]
    assert [token for token, _ in tokens] == [each.token for each in whole.content or ()]
    assert [value for _, value in tokens] == pytest.approx([each.logprob for each in whole.content or ()], abs=1e-4)
    assert sum(map(bool, counts)) > 3  # not all in the last one
    plain: Any = {"model": "base", "prompt": "the cat", "max_tokens": 12, "logprobs": 2}
    rated = client.completions.create(**plain).choices[0].logprobs
    assert rated is not None
    parts = [
        choice.logprobs
        for chunk in client.completions.create(stream=True, **plain)
        for choice in chunk.choices
        if choice.logprobs
    ]
    assert len(parts) > 3
    assert [each for part in parts for each in part.tokens or ()] == rated.tokens
    assert [each for part in parts for each in part.text_offset or ()] == rated.text_offset


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "'function' was expected"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "find"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 7}}}]}, "tools", "no JSON schema"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": TOOLS, "regex": "a+"}, "regex", "leave one"),
        ({"tools": TOOLS, **name_template("granite-4")}, "tools", "does not write 'find'"),
        ({"messages": [USER, CUT_OFF], **name_template("lfm2_v2")}, None, "refused"),
        ({"messages": [USER, CUT_OFF], **name_template("smollm3")}, None, "'find' are no JSON object"),
        ({"functions": [{"name": "f"}]}, "functions", "give tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": 7}]}]}, "messages", "7"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_are_a_400_that_says_so(
    client: openai.OpenAI, fields: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="base", messages=MESSAGES, max_tokens=4, extra_body=fields)
    assert caught.value.param == param
    assert said in str(caught.value)
