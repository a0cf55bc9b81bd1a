"""What a request says about tools: their names and parameters, which of them to call, and the form of a plain answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgelora_runtime.errors import UsageError

Schema = Mapping[str, Any]
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_MODES = ("auto", "none", "required")


@dataclass(frozen=True)
class ToolChoice:
    """Which tools an answer calls. mode: auto, none or required. names: the tools that it may call."""

    mode: str
    names: tuple[str, ...]


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Schema]:
    """Returns the schema of each tool's arguments by name.

    A tool is an object as OpenAI's API takes it, with its function under `function` or beside `type`. A tool without parameters
    takes none. Raises one UsageError that lists every tool that cannot be used.

    >>> read_tools([{"type": "function", "function": {"name": "now"}}])
    {'now': {'type': 'object', 'properties': {}, 'additionalProperties': False}}
    """
    found: dict[str, Schema] = {}
    wrong: list[str] = []
    for at, tool in enumerate(tools or ()):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
            wrong.append(f'tools[{at}] is no function; write {{"type": "function", "function": {{"name": …, "parameters": …}}}}')
            continue
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            wrong.append(f"tools[{at}] is named {_quote(name)}; use 1 to 64 letters, digits, '_', '-' and '.'")
        elif name in found:
            wrong.append(f"tools[{at}] is named {name!r} like one before it; give each tool its own name")
        elif not isinstance(parameters, Mapping | None):
            wrong.append(f"tools[{at}] ({name}) has parameters that are {type(parameters).__name__}; use a JSON schema")
        else:
            found[name] = _close(parameters)
    if wrong:
        raise UsageError("; ".join(wrong))
    return found


def read_choice(choice: object, tools: Mapping[str, Schema]) -> ToolChoice:
    """Reads a tool_choice: auto, none, required, or an object that names a function. None is auto, or none without tools.

    Raises UsageError for another value, or for a function that is not among the tools.
    """
    if choice is None:
        return ToolChoice("auto" if tools else "none", tuple(tools))
    if isinstance(choice, str) and choice in _MODES:
        if choice == "required" and not tools:
            raise UsageError("tool_choice = 'required': there are no tools to call; give tools, or leave tool_choice out")
        return ToolChoice(choice if tools else "none", tuple(tools))
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name in tools:
            return ToolChoice("required", (name,))
        raise UsageError(f"tool_choice names {_quote(name)}, which is none of the tools; use one of {', '.join(tools) or 'none'}")
    raise UsageError(
        f'tool_choice = {_quote(choice)}: use auto, none, required, or {{"type": "function", "function": {{"name": …}}}}'
    )


def read_response_format(value: object) -> dict[str, Any] | None:
    """Returns the JSON schema that a response_format asks for, or None if it is text.

    Takes OpenAI's forms: text, json_object, and json_schema with its schema under json_schema.schema, or under schema as the
    Responses API has it. Raises UsageError for anything else.

    >>> read_response_format({"type": "json_object"})
    {'type': 'object'}
    """
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        assert isinstance(value, Mapping)
        inner = value.get("json_schema", value)
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if isinstance(schema, Mapping):
            return dict(schema)
        raise UsageError("response_format json_schema has no schema; give an object as json_schema.schema")
    raise UsageError(f"response_format = {_quote(value)}: use an object of type text, json_object or json_schema")


def _close(parameters: Schema | None) -> Schema:
    """Returns a schema that allows no parameter that the tool lacks, unless it says that others may come."""
    schema = {"type": "object", **(parameters or {"properties": {}})}
    if "properties" in schema and not schema.keys() & {"additionalProperties", "patternProperties", "allOf", "anyOf", "$ref"}:
        schema["additionalProperties"] = False
    return schema


def _quote(value: object) -> str:
    return repr("".join(filter(str.isprintable, str(value)))[:60])
