"""Conversations in rows: their messages, checked once when they are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ASSISTANT = "assistant"
_TEXT_PARTS = ("text", "input_text", "output_text")  # the last two are how OpenAI's responses name theirs


@dataclass(frozen=True)
class Chat:
    """A conversation, or the start of one.

    text: its messages, and the tools that they may call, as one JSON object. As text a conversation can be compared and hashed,
    and the keys keep their order, which a chat template may print.
    """

    text: str

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> Chat:
        """Makes a conversation of messages, each a mapping with a role, and content or tool calls."""
        value: dict[str, Any] = {"messages": list(messages)}
        if tools:
            value["tools"] = list(tools)
        return cls(json.dumps(value, ensure_ascii=False))

    def __str__(self) -> str:
        return self.text

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages, made anew each time, as chat templates may change what they are given."""
        found: list[dict[str, Any]] = json.loads(self.text)["messages"]
        return found

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """The tools that the messages may call, or None."""
        found: list[dict[str, Any]] | None = json.loads(self.text).get("tools")
        return found

    @cached_property
    def is_answered(self) -> bool:
        """True if the assistant has the last word, so that no answer is asked for."""
        return bool(self.messages[-1]["role"] == ASSISTANT)

    def start(self, count: int) -> Chat:
        """Returns the first messages, with the same tools."""
        return Chat.of(self.messages[:count], self.tools)

    def answer(self, text: str) -> Chat:
        """Returns the conversation with one more message, the assistant's."""
        return Chat.of([*self.messages, {"role": ASSISTANT, "content": text}], self.tools)


def read_messages(value: object, where: str) -> list[dict[str, Any]]:
    """Checks messages from a file. where: names them in the InputError.

    Content is text, None, or a list of parts with text. Parts of other kinds are refused by name. Arguments of tool calls that
    are JSON text, as OpenAI's API has them, become objects: templates would quote the text once more.
    """
    if not isinstance(value, list) or not value:
        raise InputError(f'{where} is no list of messages; each is {{"role": …, "content": …}}')
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f'{where}: message {number} has no role; each is {{"role": …, "content": …}}')
        if message["role"] == ASSISTANT and not (message.get("content") or message.get("tool_calls")):
            raise InputError(f"{where}: message {number}, the assistant's, has neither content nor tool calls")
        _check_content(message.get("content"), f"{where}: message {number}")
    return [_parse_calls(message, f"{where}: message {number}") for number, message in enumerate(value, 1)]


def read_tools(value: object, where: str) -> list[dict[str, Any]] | None:
    """Checks the tools beside messages: a list of objects, as such or as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: tools is not JSON ({error})") from error
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InputError(f"{where}: tools is no list of objects")
    return value or None


def find_call_names(message: Mapping[str, Any]) -> list[str]:
    """Returns the names of the tools that a message calls."""
    return [str(call.get("function", call).get("name", "")) for call in message.get("tool_calls") or []]


def find_tool_names(tools: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Returns the names of tools, in the form of requests or bare."""
    described = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools or []]
    return [tool["name"] for tool in described if isinstance(tool.get("name"), str)]


def read_content(content: object) -> str:
    """Returns the text of a message's content."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def _check_content(content: object, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise InputError(f"{where}: content is {type(content).__name__}; give text, or a list of text parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in _TEXT_PARTS:
            raise InputError(f"{where} has a part of type {kind!r}; edgelora's models read text alone")
        if not isinstance(part.get("text"), str):
            raise InputError(f"{where} has a text part without text")


def _parse_calls(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns a message whose tool calls have objects as arguments."""
    calls = message.get("tool_calls")
    if calls is None:
        return message
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{where}: tool_calls is no list of objects")
    return {**message, "tool_calls": [_parse_call(call, where) for call in calls]}


def _parse_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} has a tool call without the name of a function")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: the arguments of {function['name']} are not JSON ({error})") from error
    function = {**function, "arguments": parsed}
    return {**call, "function": function} if "function" in call else function
