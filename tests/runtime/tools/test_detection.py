"""The call layouts of real templates: found by rendering, and equal to what the templates write."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelora_runtime.tools.layout import ToolCall
from tests.runtime.tools.formats import TEMPLATES, list_formats, make_format, render_answer

WRITTEN = list_formats("calls")
ORIGINAL = [name for name in WRITTEN if not name.endswith("_training")]  # those for training write calls in the same way
LAYOUTS = {  # trigger and notation, by the start of a template's name; the last that fits counts
    "qwen": ("<tool_call>", "JsonNotation"),
    "qwen3_5": ("<tool_call>", "TaggedNotation"),
    "qwen3_6": ("<tool_call>", "TaggedNotation"),
    "qwen3_8": ("<tool_call>", "TaggedNotation"),
    "nemotron": ("<tool_call>", "TaggedNotation"),
    "glm4moe": ("<tool_call>", "TaggedNotation"),
    "llama3": ("", "JsonNotation"),
    "deepseekv3": ("<｜tool▁calls▁begin｜>", "JsonNotation"),
    "gemma4": ("<|tool_call>", "GemmaNotation"),
    "diffusion_gemma": ("<|tool_call>", "GemmaNotation"),
    "lfm2": ("<|tool_call_start|>", "PythonNotation"),
    "mistral": ("[TOOL_CALLS]", "JsonNotation"),
    "phi-4-mini": ("<|tool_call|>", "JsonNotation"),
    "granite-4": ("<tool_call>", "JsonNotation"),
    "hermes": ("<tool_call>", "JsonNotation"),
    "function-gemma": ("<start_function_call>", "GemmaNotation"),
}
# Templates that mention tool_calls and whose layout is not found, with the reason.
NOT_FOUND = {
    "deepseek_r1_distill": "drops calls beside content",
    "gptoss": "writes messages to several channels",
    "muse_glimmer": "writes the name twice",
}
TEXTS = st.text(
    st.characters(max_codepoint=0x24F, exclude_categories=["C", "Z"], exclude_characters="<>[]|\"'\\"), min_size=1, max_size=8
).filter(lambda text: text == text.strip())
VALUES = st.recursive(
    st.booleans() | st.integers(-1000, 1000) | TEXTS.map(lambda text: f"a{text}"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["k", "m_1"]), inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "days", "x_1", "B"]), VALUES, max_size=3)


def make_tool(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A tool whose parameters are of the arguments' own types."""
    kinds = {str: "string", bool: "boolean", int: "integer", list: "array", dict: "object"}
    properties = {name: {"type": kinds[type(value)], "description": "d"} for name, value in arguments.items()}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def to_message(name: str, arguments: dict[str, Any], at: int = 0) -> dict[str, Any]:
    return {"id": f"callAbcd{at}", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("name", WRITTEN)
def test_layouts_are_those_of_the_family(name: str) -> None:
    found, _ = make_format(name)
    expected = [layout for start, layout in LAYOUTS.items() if name.startswith(start)][-1]
    assert (found.layout.trigger, type(found.layout.notation).__name__) == expected


def test_templates_with_calls_are_found() -> None:
    mention = {name.removesuffix("_training") for name, source in TEMPLATES.items() if "tool_call" in source}
    assert mention - {name.removesuffix("_training") for name in WRITTEN} == {*NOT_FOUND, "smollm3"}


def test_an_example_in_the_prompt_is_found() -> None:
    found, _ = make_format("smollm3")
    assert (found.source, found.layout.trigger, found.layout.middle) == ("example", "<tool_call>", '", "arguments": ')


@pytest.mark.parametrize("name", ORIGINAL)
@settings(deadline=None, max_examples=8)
@given(first=ARGUMENTS, second=ARGUMENTS, text=st.just("") | TEXTS)
def test_rendered_calls_are_parsed_and_written(name: str, first: dict[str, Any], second: dict[str, Any], text: str) -> None:
    """The template writes calls, the parser reads them back, and the layout writes them as the template did."""
    found, tokenizer = make_format(name)
    tools = [make_tool("find", first), make_tool("f.2", second)]
    calls = [to_message("find", first), to_message("f.2", second, 1)]
    answer: dict[str, Any] = {"content": text, "tool_calls": calls}
    rendered = render_answer(tokenizer, answer, tools)
    if rendered is None:  # a template for one call per answer
        answer["tool_calls"] = calls = calls[:1]
        rendered = render_answer(tokenizer, answer, tools)
    assert rendered is not None
    prompt, written = rendered
    parsed = found.parse(written, tools, prompt=prompt)
    assert [(call.name, json.loads(call.arguments)) for call in parsed.calls] == [
        (call["function"]["name"], call["function"]["arguments"]) for call in calls
    ]
    if "\x00" in found.layout.texts:
        assert [call.id for call in parsed.calls] == [call["id"] for call in calls]
    again = found.layout.write(
        [ToolCall(call["id"], call["function"]["name"], json.dumps(call["function"]["arguments"])) for call in calls]
    )
    assert normalize(again) in normalize(written)


def normalize(text: str) -> str:
    """Without whitespace, and with JSON's booleans and quotes: some templates write Python's, which their models then see."""
    return "".join(text.split()).replace("True", "true").replace("False", "false").replace("'", '"')


@pytest.mark.parametrize("name", [name for name in TEMPLATES if make_format(name)[0].thoughts])
def test_rendered_thoughts_are_split(name: str) -> None:
    found, tokenizer = make_format(name)
    rendered = render_answer(tokenizer, {"content": "Blue.", "reasoning_content": "The sky\nis asked for."}, [])
    assert rendered is not None
    prompt, written = rendered
    parsed = found.parse(written, prompt=prompt)
    assert parsed.text.startswith("Blue.")
    assert parsed.thought in ("The sky\nis asked for.", "")
    assert parsed.thought or "The sky" not in written
