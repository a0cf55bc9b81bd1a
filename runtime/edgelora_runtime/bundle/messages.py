"""The messages of a conversation, and all else that a chat template is given, checked once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date as Date  # noqa: N812 - the option is named date
from datetime import datetime, time
from typing import Any, TypedDict, cast

from edgelora_runtime.errors import InputError, UsageError

Message = Mapping[str, Any]

_TEXT = "text"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_OWN_OPTIONS = {
    "messages": "the prompt",
    "tools": "the option tools",
    "documents": "the option documents",
    "add_generation_prompt": "the runtime itself, which asks for an answer",
    "continue_final_message": "the option continue_final_message",
}


class ChatOptions(TypedDict, total=False):
    """The options of a request that its chat template sees. GenerateOptions explains each."""

    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    template_options: Mapping[str, Any] | None
    date: str | Date | None
    continue_final_message: bool


CHAT_OPTIONS = tuple(ChatOptions.__annotations__)


@dataclass(frozen=True)
class Chat:
    """A checked conversation, in plain JSON types.

    messages: each with a role, without keys whose value is None. tools, documents: None where the caller gave none. variables:
    the template options. template: the name of the template that the caller asked for. moment: the fixed clock, or None for the
    current time. continues: the answer goes on with the last message.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    template: str | None = None
    moment: datetime | None = None
    continues: bool = False


def is_message(item: object) -> bool:
    """True for what stands for a message: a mapping, a dataclass, or a pydantic model such as OpenAI's client returns."""
    return isinstance(item, Mapping) or _as_mapping(item) is not None


def check_chat(messages: Sequence[object], options: ChatOptions) -> Chat:
    """Checks a conversation and what its template is given.

    As in transformers, a key whose value is None is left out of its message, and reasoning is passed under the names
    reasoning_content and thinking:
    https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/utils/chat_template_utils.py
    Raises InputError for messages that no template can take, such as one with an image, UsageError for options that cannot be
    used.
    """
    if not messages:
        raise InputError("the conversation is empty; give at least one message")
    given = options.get("template_options")
    if not isinstance(given, Mapping | None):
        raise UsageError(f"template_options is {type(given).__name__}, not an object of names and values")
    variables = dict(given or {})
    template = variables.pop("chat_template", None)
    wrong = [f"template option {name!r} is given by {_OWN_OPTIONS[name]}" for name in variables if name in _OWN_OPTIONS]
    wrong += [f"template option {name!r} has no text as its name" for name in variables if not isinstance(name, str)]
    if not isinstance(template, str | None):
        wrong.append(f"template option 'chat_template' is {type(template).__name__}, not the name of a template")
    if wrong:
        raise UsageError("; ".join(wrong))
    return Chat(
        messages=[_check_message(message, f"messages[{at}]") for at, message in enumerate(messages)],
        tools=_check_objects(options.get("tools"), "tools", "a JSON schema of the tool"),
        documents=_check_objects(options.get("documents"), "documents", "an object with title and text"),
        variables={name: _to_plain(value, f"template option {name!r}") for name, value in variables.items()},
        template=template,
        moment=read_date(options.get("date")),
        continues=options.get("continue_final_message", False),
    )


def read_date(value: object) -> datetime | None:
    """Reads the option date: a date, or its text as YYYY-MM-DD. The clock then stands at midnight.

    Raises UsageError for anything else.
    """
    if value is None or isinstance(value, datetime):
        return value
    if isinstance(value, Date):
        return datetime.combine(value, time())
    if isinstance(value, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        try:
            return datetime.combine(Date.fromisoformat(value), time())
        except ValueError:
            pass
    raise UsageError(f"date = {value!r}: use YYYY-MM-DD, such as 2025-01-31")


def join_parts(content: object) -> str:
    """Returns a message's text, with a line for each part if it has several. That of a message without content is empty.

    vLLM and llama.cpp join parts so, for templates that expect text.
    """
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) else []
    return "\n".join(part[_TEXT] for part in parts)


def _check_message(message: object, where: str) -> dict[str, Any]:
    plain = _to_plain(message, where)
    if not isinstance(plain, dict):
        raise InputError(f"{where} is {type(message).__name__}, not an object with role and content")
    plain = {key: value for key, value in plain.items() if value is not None}
    role = plain.get("role")
    if not isinstance(role, str):
        said = "no role" if role is None else f"a role that is {type(role).__name__}, not text"
        raise InputError(f"{where} has {said}; use user, assistant, system or tool")
    content = plain.get("content")
    if isinstance(content, list | tuple):
        for at, part in enumerate(content):
            _check_part(part, f"{where}.content[{at}]")
    elif not isinstance(content, str | None):
        raise InputError(f"{where}.content is {type(content).__name__}; use text, None, or a list of text parts")
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _check_part(part: object, where: str) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InputError(f'{where} is no part of a message; write {{"type": "text", "text": …}}')
    if part["type"] != _TEXT:
        raise InputError(f"{where} is of type {_printable(part['type'])}, but this runtime reads text parts only; leave it out")
    if not isinstance(part.get(_TEXT), str):
        raise InputError(f"{where} is a text part without text")


def _check_objects(value: object, name: str, form: str) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise InputError(f"{name} is {type(value).__name__}, not a list, each item {form}")
    for at, item in enumerate(value):
        if not is_message(item):
            raise InputError(f"{name}[{at}] is {type(item).__name__}, not {form}")
    return cast("list[dict[str, Any]]", [_to_plain(item, f"{name}[{at}]") for at, item in enumerate(value)])


def _to_plain(value: object, where: str) -> Any:
    """Rebuilds a value of plain JSON types, so that a template reaches no method of the caller's objects."""
    if value is None or type(value) in (int, float, bool):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where} holds the lone surrogate U+{ord(value[error.start]):04X}, which is no character") from None
        return str.__str__(value)
    if isinstance(value, int | float):  # of a subclass
        return float(value) if isinstance(value, float) else int(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:  # a scalar, without importing numpy
        return _to_plain(value.item(), where)  # type: ignore[attr-defined]
    try:
        if isinstance(value, list | tuple):
            items = (_to_plain(item, f"{where}[{at}]") for at, item in enumerate(value))
            return tuple(items) if isinstance(value, tuple) else list(items)
        mapping = _as_mapping(value)
        if mapping is not None:
            return {_to_plain(key, where): _to_plain(item, f"{where}.{_printable(key)}") for key, item in mapping.items()}
    except RecursionError:
        raise InputError(f"{where.partition('[')[0]} is nested too deeply, or holds itself") from None
    raise InputError(f"{where} is {type(value).__name__}, which is no JSON value; convert it first")


def _as_mapping(value: object) -> Mapping[Any, Any] | None:
    """Returns an object's fields, if it is a mapping, a dataclass or a pydantic model."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    dump = getattr(value, "model_dump", None)
    return cast("Mapping[Any, Any]", dump()) if callable(dump) and not isinstance(value, type) else None


def _printable(value: object) -> str:
    return "".join(filter(str.isprintable, str(value)))[:60]
