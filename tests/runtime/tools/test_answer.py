"""Answers parsed while they are written: the same calls and texts however they are cut, and nothing is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelora_runtime.tools.answer import Answer, AnswerParser, CallDelta, TextDelta, ThoughtDelta, join_deltas, make_id
from edgelora_runtime.tools.conversation import fit_messages
from edgelora_runtime.tools.detection import ThoughtMarks
from edgelora_runtime.tools.format import HERMES
from edgelora_runtime.tools.layout import CallLayout
from tests.runtime.tools.formats import USER, make_format

THOUGHTS = ThoughtMarks("<think>", "</think>")
BARE = CallLayout('{"name": "', '", "parameters": ', "}", prefixes=("<|python_tag|>",))
CALL = '<tool_call>\n{"name": "find", "arguments": {"city": "R}\\"ome"}}\n</tool_call>'
ARGUMENTS = '{"city": "R}\\"ome"}'
PIECES = [
    CALL,
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "\n",
    " ",
    "a",
    "<",
    '{"name": "f"',
    "}",
    '{"name": "f", "arguments": {}}',
    "[",
    ",",
]


def parse(text: str, layout: CallLayout | None = HERMES, *, in_thought: bool = False) -> Answer:
    return AnswerParser(layout, THOUGHTS, new_id=lambda: "id", in_thought=in_thought).parse(text)


def list_calls(answer: Answer) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in answer.calls]


@pytest.mark.parametrize(
    ("text", "said", "thought", "calls"),
    [
        ("", "", "", []),
        ("Hello. ", "Hello. ", "", []),
        ("<think>\nWell\n</think>\n\nHello.", "Hello.", "Well", []),
        (f"Look:\n{CALL}", "Look:", "", [("find", ARGUMENTS)]),
        (f"<think>a</think>{CALL}\n{CALL}", "", "a", [("find", ARGUMENTS)] * 2),
        (f"{CALL} done", "done", "", [("find", ARGUMENTS)]),
        (f'{CALL}\n<tool_call>\n{{"na', "", "", [("find", ARGUMENTS)]),
        (f"{CALL}\n<tool", "", "", [("find", ARGUMENTS)]),
        ("<tool_call>", "<tool_call>", "", []),
        ("<tool_call>{'name'}</tool_call> x", "<tool_call>{'name'}</tool_call> x", "", []),
        ('<tool_call>{"arguments":{"a":1},"name":"f"}</tool_call>', "", "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name":"f","arguments":"{\\"a\\":1}"}</tool_call>', "", "", [("f", '{"a": 1}')]),
        ('<tool_call>{"type":"function","function":{"name":"f","arguments":{}}}</tool_call>', "", "", [("f", "{}")]),
        (
            '<tool_call>[{"name":"f","arguments":{}}, {"name":"g","parameters":{}}]</tool_call>',
            "",
            "",
            [("f", "{}"), ("g", "{}")],
        ),
        ('<tool_call>\n{"name": "find", "arg', '<tool_call>\n{"name": "find", "arg', "", []),
        ('<tool_call>\n{"name": "find", "arguments": {"ci', "", "", [("find", '{"ci')]),
        ("a <tool_ca", "a <tool_ca", "", []),
        ("<think>never closed", "", "never closed", []),
    ],
)
def test_answers(text: str, said: str, thought: str, calls: list[tuple[str, str]]) -> None:
    answer = parse(text)
    assert (answer.text, answer.thought, list_calls(answer)) == (said, thought, calls)


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ('<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", [("f", "{}"), ("g", "{}")]),
        ('{"city": "Rome"}', '{"city": "Rome"}', []),
        ('{"name": "Rome"}', '{"name": "Rome"}', []),
        ('Say {"name": "f", "parameters": {}}', 'Say {"name": "f", "parameters": {}}', []),
        ("{not json", "{not json", []),
    ],
)
def test_calls_without_a_mark(text: str, said: str, calls: list[tuple[str, str]]) -> None:
    answer = parse(text, BARE)
    assert (answer.text, list_calls(answer)) == (said, calls)


def test_a_thought_that_the_prompt_opened() -> None:
    assert parse("\nWell\n</think>\n\nHi", in_thought=True) == Answer("Hi", "Well", ())


def test_calls_stay_text_without_a_layout() -> None:
    assert parse(CALL, None).text == CALL


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=6),
    st.lists(st.integers(1, 9), max_size=30),
    st.booleans(),
    st.sampled_from([HERMES, BARE, None]),
)
def test_pieces_make_no_difference(pieces: list[str], sizes: list[int], in_thought: bool, layout: CallLayout | None) -> None:
    text = "".join(pieces)
    parser = AnswerParser(layout, THOUGHTS, new_id=lambda: "id", in_thought=in_thought)
    deltas, rest = [], text
    for size in [*sizes, *[1] * len(text)]:
        deltas += parser.push(rest[:size])
        rest = rest[size:]
    assert join_deltas([*deltas, *parser.finish()]) == parse(text, layout, in_thought=in_thought)


@settings(max_examples=40, deadline=None)
@given(st.text(st.sampled_from('ab <>/{}"[],:\n'), max_size=40))
def test_text_without_marks_is_kept(text: str) -> None:
    for layout in (HERMES, BARE):
        assert parse(text, layout).text == text or not text.strip()


def test_text_and_arguments_are_passed_on_at_once() -> None:
    parser = AnswerParser(HERMES, THOUGHTS, new_id=lambda: "id")
    assert parser.push("Hello") == [TextDelta("Hello")]
    assert parser.push('\n<tool_call>\n{"name": "f", "arguments": {"a') == [CallDelta(0, "", "id", "f"), CallDelta(0, '{"a')]
    assert parser.push('": 1}') == [CallDelta(0, '": 1}')]
    assert parser.push("}\n</tool_call>") == []
    thinking = AnswerParser(None, THOUGHTS)
    assert thinking.push("<think>So") == [ThoughtDelta("So")]


def test_ids_are_those_that_mistral_requires() -> None:
    assert len({make_id() for _ in range(100)}) == 100
    assert all(len(name) == 9 and name.isalnum() for name in (make_id() for _ in range(100)))


def test_messages_are_fitted_to_templates_without_tools() -> None:
    call = {"id": "x", "type": "function", "function": {"name": "find", "arguments": '{"city": "Rome"}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    tools: list[dict[str, Any]] = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    found, tokenizer = make_format("smollm2", with_marks=False)
    assert found.source == "default"
    fitted, left = fit_messages(found, messages, tools)
    text = tokenizer.render_chat(fitted, tools=left)
    assert json.dumps(tools[0]) in text
    assert text.count('{"name": "find", "arguments": {"city": "Rome"}}') == 1
    assert "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>" in text
    example, _ = make_format("smollm3")
    assert fit_messages(example, messages, tools)[1] == tools
    written, _ = make_format("hermes")
    parsed = fit_messages(written, messages, tools)[0][1]["tool_calls"][0]["function"]["arguments"]
    assert parsed == {"city": "Rome"}
