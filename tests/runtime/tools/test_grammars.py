"""Answers that random logits write under a grammar: they parse into calls that fit their tools' schemas."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import jsonschema
import numpy as np
import pytest

from edgelora_runtime.decode.grammar import Grammars
from edgelora_runtime.errors import UsageError
from edgelora_runtime.tools.declarations import read_choice, read_response_format, read_tools
from tests.runtime.tools.formats import list_formats, make_format

if TYPE_CHECKING:
    from edgelora_runtime.bundle.manifest import ModelEntry
    from edgelora_runtime.bundle.tokenizer import Tokenizer

END = 1
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
        "kind": {"enum": ["a", "b é"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2},
        "deep": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False},
    },
    "required": ["city", "deep"],
}
TOOLS = [
    {"type": "function", "function": {"name": "find", "description": "d", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "description": "d"}},
]
NAMED = {"type": "function", "function": {"name": "find"}}
FORMATS = [name for name in list_formats("calls", "example", "tokens", "default") if not name.endswith("_training")]
REPRESENTATIVE = ["qwen3_instruct_2507", "qwen3_6", "llama3_1", "gemma4", "lfm2_v2", "glm4moe", "mistral-list", "mistral-ids"]
REPRESENTATIVE = [name for name in [*REPRESENTATIVE, "phi-4-mini", "granite-4", "smollm3", "function-gemma"] if name in FORMATS]


def write(grammar: str, tokenizer: Tokenizer, seed: int, *, likes: str = "") -> tuple[list[int], bool]:
    """Tokens drawn from random logits under a grammar, and whether the answer is whole.

    likes: marks that are written wherever they may be, so that a thought ends and calls come.
    """
    random = np.random.default_rng(seed)
    model = cast("ModelEntry", SimpleNamespace(vocab_size=tokenizer.size, eos_token_ids=(END,)))
    constraint = Grammars(tokenizer, model).compile(grammar=grammar)
    assert constraint is not None
    liked = [token for text, token in tokenizer.added_tokens.items() if text in likes]
    tokens: list[int] = []
    while len(tokens) < 600:
        logits = random.normal(size=tokenizer.size).astype(np.float32)
        logits[liked] += 5
        token = int(np.argmax(constraint.mask(logits)))
        if token == END:
            return tokens, True
        tokens.append(token)
        if not constraint.advance(token):
            return tokens, True
    return tokens, False


@pytest.mark.parametrize("with_marks", [True, False])
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_required_call_fits_its_schema(name: str, with_marks: bool) -> None:
    """Marks may be special tokens, added tokens with a text, or plain text."""
    found, tokenizer = make_format(name, with_marks=with_marks)
    kept = tokenizer.find_added_tokens(found.keep_tokens)
    likes = "" if found.thoughts is None else found.thoughts.closing
    schemas = {"find": SCHEMA, "now": {"type": "object", "maxProperties": 0}}
    whole = 0
    for choice, seed in (("required", 0), (NAMED, 2)):
        grammar = found.grammar(TOOLS, choice)
        assert grammar is not None
        tokens, ended = write(grammar, tokenizer, seed, likes=likes)
        answer = found.parse(tokenizer.decode(tokens, kept), TOOLS, choice)
        if not ended:  # a thought of random text seldom ends where its mark is no token
            continue
        whole += 1
        assert answer.calls
        assert not answer.text
        assert choice == "required" or [call.name for call in answer.calls] == ["find"]
        for call in answer.calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
    assert whole or (found.thoughts is not None and not with_marks)


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_auto_allows_text_and_calls(name: str) -> None:
    found, tokenizer = make_format(name)
    kept = tokenizer.find_added_tokens(found.keep_tokens)
    grammar = found.grammar(TOOLS, "auto")
    assert grammar is not None
    likes = found.layout.trigger + ("" if found.thoughts is None else found.thoughts.closing)
    seen = set()
    for seed in range(40):
        tokens, ended = write(grammar, tokenizer, seed, likes=likes if seed % 2 else "")
        answer = found.parse(tokenizer.decode(tokens, kept), TOOLS, "auto")
        if ended:
            seen.add(bool(answer.calls))
            for call in answer.calls:
                jsonschema.validate(json.loads(call.arguments), SCHEMA if call.name == "find" else {"maxProperties": 0})
        if len(seen) == 2:
            break
    assert seen == {True, False} or not found.layout.trigger  # random text seldom starts with a brace


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_none_allows_no_call(name: str) -> None:
    found, tokenizer = make_format(name)
    grammar = found.grammar(TOOLS, "none")
    assert (grammar is None) == (not found.layout.trigger)
    if grammar is None or found.layout.trigger not in tokenizer.added_tokens:
        return
    tokens, _ = write(grammar, tokenizer, 0, likes=found.layout.trigger)
    assert tokenizer.added_tokens[found.layout.trigger] not in tokens


def test_one_call_unless_parallel() -> None:
    found, tokenizer = make_format("hermes")
    grammar = found.grammar(TOOLS, "required", parallel=False)
    assert grammar is not None
    for seed in range(40):
        tokens, ended = write(grammar, tokenizer, seed)
        assert not ended or len(found.parse(tokenizer.decode(tokens), TOOLS).calls) == 1


def test_json_after_a_thought_that_the_prompt_opened() -> None:
    found, tokenizer = make_format("qwen3_6") if "qwen3_6" in FORMATS else make_format("mistral-arguments")
    assert found.thoughts is not None
    prompt = f"a{found.thoughts.opening}\n"
    schema = read_response_format({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}})
    grammar = found.grammar(None, json_schema=schema, prompt=prompt)
    assert grammar is not None
    kept = tokenizer.find_added_tokens(found.keep_tokens)
    tokens, ended = write(grammar, tokenizer, 0, likes=found.thoughts.closing)
    assert ended
    jsonschema.validate(json.loads(found.parse(tokenizer.decode(tokens, kept), prompt=prompt).text), SCHEMA)


def test_no_tools_need_no_grammar_without_marks() -> None:
    assert make_format("smollm2")[0].parse("<tool_call>\n{}").text == "<tool_call>\n{}"


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"type": "web_search"}], "tools[0] is no function"),
        ([{"type": "function", "function": {"name": "a b"}}], "tools[0] is named 'a b'"),
        ([{"function": {"name": "a"}}, {"function": {"name": "a"}}], "tools[1] is named 'a' like one before it"),
        ([{"function": {"name": "a", "parameters": []}}], "tools[0] (a) has parameters that are list"),
        ([3], "tools[0] is no function"),
    ],
)
def test_wrong_tools_are_named(tools: list[Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_tools(tools)
    assert message in str(caught.value)


@pytest.mark.parametrize("choice", ["any", 3, {"type": "function", "function": {"name": "other"}}, {"type": "x"}])
def test_wrong_choices_are_named(choice: object) -> None:
    with pytest.raises(UsageError, match="tool_choice"):
        read_choice(choice, read_tools(TOOLS))


@pytest.mark.parametrize("value", ["json", {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": 3}])
def test_wrong_response_formats_are_named(value: object) -> None:
    with pytest.raises(UsageError, match="response_format"):
        read_response_format(value)


def test_response_formats() -> None:
    assert read_response_format({"type": "text"}) is None
    assert read_response_format({"type": "json_object"}) == {"type": "object"}
    assert read_response_format({"type": "json_schema", "schema": SCHEMA}) == SCHEMA
