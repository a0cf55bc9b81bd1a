"""Messages and what a template is given besides them: passed on as transformers passes them, or refused in one line."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora_runtime.bundle.messages import check_chat, read_date
from edgelora_runtime.errors import InputError, UsageError

HELLO = [{"role": "user", "content": "hello"}]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(JSON, st.text())
def test_json_reaches_the_template_as_transformers_passes_it(value: Any, content: str) -> None:
    from transformers.utils.chat_template_utils import _alias_reasoning_fields, _normalize_chat_messages, _plain_template_data

    messages = [{"role": "user", "content": content, "extra": value, "tool_calls": None, "reasoning": content}]
    theirs = _alias_reasoning_fields(_plain_template_data(_normalize_chat_messages(messages)))
    ours = check_chat(messages, {"template_options": {"x": value}, "tools": [{"v": value}]})
    assert ours.messages == theirs
    assert [list(message) for message in ours.messages] == [list(message) for message in theirs], "the order of the keys"
    assert ours.variables == {"x": value}
    assert ours.tools == [{"v": value}]


def test_objects_become_plain_values() -> None:
    @dataclass
    class Call:
        name: str
        arguments: dict[str, Any]

    class Model:
        def model_dump(self) -> dict[str, Any]:
            return {"role": "assistant", "content": None, "tool_calls": [Call("f", {"n": np.int64(3), "x": np.float32(0.5)})]}

    chat = check_chat([*HELLO, Model()], {})
    assert chat.messages[1] == {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"n": 3, "x": 0.5}}]}
    assert type(chat.messages[1]["tool_calls"][0]["arguments"]["n"]) is int


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


REFUSED: dict[str, tuple[Any, str]] = {
    "no messages": ([], "the conversation is empty"),
    "no role": ([{"content": "x"}], r"messages\[0\] has no role"),
    "a role of None": ([{"role": None, "content": "x"}], r"messages\[0\] has no role"),
    "a number as role": ([*HELLO, {"role": 1, "content": "x"}], r"messages\[1\] has a role that is int"),
    "a number as content": ([{"role": "user", "content": 1}], r"messages\[0\].content is int"),
    "text as a message": ([*HELLO, "hi"], r"messages\[1\] is str"),
    "text as a part": ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\] is no part"),
    "a part without type": ([{"role": "user", "content": [{"text": "x"}]}], "is no part of a message"),
    "a part without text": ([{"role": "user", "content": [{"type": "text"}]}], "is a text part without text"),
    "an image": (
        [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}}]}],
        r"messages\[0\].content\[1\] is of type image_url, but this runtime reads text parts only",
    ),
    "sound": ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "is of type input_audio"),
    "control characters": ([{"role": "user", "content": [{"type": "\x1b[2Ja\nb"}]}], r"is of type \[2Jab, but"),
    "a surrogate": ([{"role": "user", "content": "a\ud800"}], r"messages\[0\].content holds the lone surrogate U\+D800"),
    "an object": ([{"role": "user", "content": "x", "sent": datetime.date(2025, 1, 1)}], r"messages\[0\].sent is date"),
    "endless nesting": ([{"role": "user", "content": "x", "deep": nested(5000)}], "messages is nested too deeply"),
}


@pytest.mark.parametrize(("messages", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_messages_that_no_template_can_take(messages: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        check_chat(messages, {})
    assert "\n" not in str(raised.value)
    assert str(raised.value).isprintable()


CLASHES: dict[str, tuple[Any, type[Exception], str]] = {
    "messages": ({"template_options": {"messages": []}}, UsageError, "'messages' is given by the prompt"),
    "tools": ({"template_options": {"tools": []}}, UsageError, "'tools' is given by the option tools"),
    "all at once": ({"template_options": {"tools": [], "documents": []}}, UsageError, "'tools'.*; .*'documents'"),
    "the answer": ({"template_options": {"add_generation_prompt": False}}, UsageError, "add_generation_prompt"),
    "a list": ({"template_options": [1]}, UsageError, "template_options is list"),
    "a number as name": ({"template_options": {1: 2}}, UsageError, "has no text as its name"),
    "a template that is no name": ({"template_options": {"chat_template": 3}}, UsageError, "is int, not the name of a template"),
    "a function as tool": ({"tools": [print]}, InputError, r"tools\[0\] is builtin_function_or_method, not a JSON schema"),
    "text as documents": ({"documents": "x"}, InputError, "documents is str, not a list"),
    "a date in words": ({"date": "today"}, UsageError, "use YYYY-MM-DD"),
}


@pytest.mark.parametrize(("options", "error", "said"), CLASHES.values(), ids=CLASHES.keys())
def test_options_that_cannot_be_used(options: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        check_chat(HELLO, options)


def test_dates() -> None:
    noon = datetime.datetime(2025, 1, 31, 12)
    midnight = datetime.datetime(2025, 1, 31)
    assert read_date("2025-01-31") == read_date(datetime.date(2025, 1, 31)) == midnight
    assert read_date(noon) == noon
    assert read_date(None) is None
    for wrong in ("2025-1-31", "2025-02-30", "20250131", "2025-W05-5", 5):
        with pytest.raises(UsageError, match="use YYYY-MM-DD"):
            read_date(wrong)
