"""Conversations with tools, brought into a form that a template writes whole."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgelora_runtime.bundle.messages import check_chat, join_parts
from edgelora_runtime.errors import InputError
from edgelora_runtime.tools.layout import ToolCall, load_arguments

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgelora_runtime.tools.format import ToolFormat

    Messages = list[dict[str, Any]]
    Tools = list[dict[str, Any]] | None


def fit_messages(
    format: ToolFormat,  # noqa: A002 - the field's word
    messages: Sequence[object],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Messages, Tools]:
    """Returns messages and tools for a template, none of which it leaves out.

    Arguments that are JSON text, as OpenAI's API has them, become objects, since templates would quote the text once more.
    Where a template writes no calls, they become text of their message. Where it knows no tools, these are declared in the
    system message, or else the first user's, and results become messages of the user. Raises InputError for messages that
    cannot be used.
    """
    chat = check_chat(messages, {"tools": tools})
    found = [_parse_arguments(message) for message in chat.messages]
    if format.source == "calls":
        return found, chat.tools
    found = [_write_calls(format, message) for message in found]
    if format.source == "example":
        return found, chat.tools
    found = _write_results(found)
    return (_declare(format, found, chat.tools) if chat.tools else found), None


def _parse_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return message
    if not calls:  # some templates take an empty list for calls
        return {key: value for key, value in message.items() if key != "tool_calls"}
    return {**message, "tool_calls": [_parse_call(call) for call in calls]}


def _parse_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": load_arguments(function["arguments"] or "{}")}}


def _write_calls(format: ToolFormat, message: dict[str, Any]) -> dict[str, Any]:  # noqa: A002
    """Moves a message's calls into its text."""
    if "tool_calls" not in message:
        return message
    calls = [
        call["function"] for call in message["tool_calls"] if isinstance(call, dict) and isinstance(call.get("function"), dict)
    ]
    if wrong := next((call for call in calls if not isinstance(call.get("arguments", {}), dict)), None):
        raise InputError(f"tool_calls: the arguments of {str(wrong.get('name'))[:60]!r} are no JSON object; leave the call out")
    written = [ToolCall("", str(call.get("name", "")), json.dumps(call.get("arguments", {}))) for call in calls]
    texts = [join_parts(message.get("content")), format.layout.write(written)]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(filter(None, texts))}


def _write_results(messages: Messages) -> Messages:
    """Turns results of tools into messages of the user, those in a row into one."""
    found: Messages = []
    is_result = False
    for message in messages:
        if message["role"] != "tool":
            found.append(message)
            is_result = False
            continue
        text = f"<tool_response>\n{join_parts(message.get('content'))}\n</tool_response>"
        if is_result:
            found[-1]["content"] += f"\n{text}"
        else:
            found.append({"role": "user", "content": text})
        is_result = True
    return found


def _declare(format: ToolFormat, messages: Messages, tools: Sequence[Mapping[str, Any]]) -> Messages:  # noqa: A002
    """Puts tools into the system message, or else the first user's, since not every template knows a system message."""
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = format.layout.write([ToolCall("", "NAME", '{"PARAMETER": "VALUE"}')])
    text = f"You can call these tools:\n<tools>\n{schemas}\n</tools>\nTo call one, write:\n{example}"
    at = next((at for role in ("system", "user") for at, message in enumerate(messages) if message["role"] == role), None)
    if at is None:
        return [{"role": "system", "content": text}, *messages]
    changed = {**messages[at], "content": "\n\n".join(filter(None, [text, join_parts(messages[at].get("content"))]))}
    return [*messages[:at], changed, *messages[at + 1 :]]
