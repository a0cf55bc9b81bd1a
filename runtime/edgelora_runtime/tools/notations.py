"""Notations of a call's arguments: JSON, tagged parameters, Gemma's braces, and Python's keywords."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from edgelora_runtime.tools.reading import Incomplete, Malformed, read_json, read_literal, read_name, read_until, skip_blanks

Arguments = Mapping[str, Any]
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPES = str.maketrans({"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r"})  # as LFM2's template writes texts


class Notation(Protocol):
    """A way to write a call's arguments.

    read() returns the arguments and the position after them, and raises Incomplete or Malformed. schema: that of the arguments,
    for notations that do not say which value is a text.
    """

    def write(self, arguments: Arguments) -> str: ...

    def read(self, text: str, at: int, schema: Arguments) -> tuple[Arguments, int]: ...

    @property
    def marks(self) -> str: ...


@dataclass(frozen=True)
class JsonNotation:
    """Arguments as a JSON object."""

    marks = ""

    def write(self, arguments: Arguments) -> str:
        return _write_json(arguments)

    def read(self, text: str, at: int, schema: Arguments) -> tuple[Arguments, int]:  # noqa: ARG002 - JSON has its types
        value, end = read_json(text, at)
        if not isinstance(value, dict):
            raise Malformed
        return value, end


@dataclass(frozen=True)
class TaggedNotation:
    """A tag per parameter, as in Qwen 3.5: `<parameter=city>`, a line with the value, and `</parameter>`.

    before: the text before a parameter's name. between: the text between name and value. after: the text after the value. A
    text is written as it is, and any other value as JSON.
    """

    before: str
    between: str
    after: str

    @property
    def marks(self) -> str:
        return self.before + self.between + self.after

    def write(self, arguments: Arguments) -> str:
        values = {name: value if isinstance(value, str) else _write_json(value) for name, value in arguments.items()}
        return "".join(f"{self.before}{name}{self.between}{value}{self.after}" for name, value in values.items())

    def read(self, text: str, at: int, schema: Arguments) -> tuple[Arguments, int]:
        found: dict[str, Any] = {}
        while True:
            try:
                start = read_literal(text, at, self.before)
            except Malformed:
                return found, at
            name, start = read_name(text, start)
            start = read_literal(text, start, self.between)
            value, at = read_until(text, start, self.after)
            found[name] = _read_untyped(value, find_parameter(schema, name))


@dataclass(frozen=True)
class GemmaNotation:
    """Braces with bare names, as in Gemma 4 and FunctionGemma: `{city:<|"|>Rome<|"|>,days:2}`.

    quote: the mark on both sides of a text.
    """

    quote: str

    @property
    def marks(self) -> str:
        return self.quote

    def write(self, arguments: Arguments) -> str:
        return self.write_value(arguments)

    def read(self, text: str, at: int, schema: Arguments) -> tuple[Arguments, int]:  # noqa: ARG002 - texts are quoted
        if text[at : at + 1] not in ("{", ""):
            raise Malformed
        value, end = self._read(text, at)
        assert isinstance(value, dict)
        return value, end

    def write_value(self, value: object) -> str:
        if isinstance(value, str):
            return f"{self.quote}{value}{self.quote}"
        if isinstance(value, Mapping):
            items = sorted(value.items(), key=lambda item: str(item[0]).lower())  # as Jinja's dictsort does
            return "{" + ",".join(f"{name}:{self.write_value(item)}" for name, item in items) + "}"
        if isinstance(value, list | tuple):
            return "[" + ",".join(map(self.write_value, value)) + "]"
        return _write_json(value)

    def _read(self, text: str, at: int) -> tuple[object, int]:
        at = skip_blanks(text, at)
        if text.startswith("{", at):
            return self._read_object(text, at + 1)
        if text.startswith("[", at):
            return self._read_list(text, at + 1)
        try:
            return read_until(text, read_literal(text, at, self.quote), self.quote)
        except Malformed:
            return read_json(text, at)

    def _read_object(self, text: str, at: int) -> tuple[object, int]:
        items: dict[str, Any] = {}
        while not text.startswith("}", at := skip_blanks(text, at)):
            name, at = read_name(text, read_literal(text, at, ",") if items else at)
            items[name], at = self._read(text, read_literal(text, at, ":"))
        return items, at + 1

    def _read_list(self, text: str, at: int) -> tuple[object, int]:
        values: list[Any] = []
        while not text.startswith("]", at := skip_blanks(text, at)):
            value, at = self._read(text, read_literal(text, at, ",") if values else at)
            values.append(value)
        return values, at + 1


@dataclass(frozen=True)
class PythonNotation:
    """Keyword arguments in parentheses, as in LFM2: `(city='Rome', days=2)`. Objects and lists are JSON or Python."""

    marks = ""

    def write(self, arguments: Arguments) -> str:
        return "(" + ", ".join(f"{name}={self.write_value(value)}" for name, value in arguments.items()) + ")"

    @staticmethod
    def write_value(value: object) -> str:
        if isinstance(value, bool) or value is None:
            return repr(value)
        return f"'{value.translate(_ESCAPES)}'" if isinstance(value, str) else _write_json(value)

    def read(self, text: str, at: int, schema: Arguments) -> tuple[Arguments, int]:  # noqa: ARG002 - Python has its types
        if text[at : at + 1] not in ("(", ""):
            raise Malformed
        end = find_python_end(text, at)
        try:
            call = ast.parse("f" + text[at:end], mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise Malformed from None
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise Malformed
        try:
            found = {str(keyword.arg): _read_python(keyword.value) for keyword in call.keywords}
            json.dumps(found, allow_nan=False).encode()
        except (ValueError, TypeError):  # a value that JSON lacks
            raise Malformed from None
        return found, end


def find_python_end(text: str, at: int) -> int:
    """Returns the position after the bracket that closes the one at `at`. Raises Incomplete if there is none yet."""
    depth, quote = 0, ""
    position = at
    while position < len(text):
        character = text[position]
        if quote:
            if character == "\\":
                position += 1
            elif character == quote:
                quote = ""
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth <= 0:
                return position + 1
        position += 1
    raise Incomplete


def _read_python(node: ast.expr) -> Any:
    """Returns the value of a literal. JSON's true, false and null are taken as well."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -node.operand.value  # type: ignore[operator]
    if isinstance(node, ast.List | ast.Tuple):
        return [_read_python(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_read_python(key) if key else None: _read_python(item) for key, item in zip(node.keys, node.values, strict=True)}
    raise ValueError("no literal")


def find_parameter(schema: Arguments, name: str) -> Arguments:
    """Returns the schema of a parameter, with the definitions that it may refer to. An unknown one has an empty schema."""
    properties = schema.get("properties")
    found = properties.get(name) if isinstance(properties, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    return {**found, **{key: schema[key] for key in ("$defs", "definitions") if key in schema}}


def is_text(schema: Arguments) -> bool:
    """True for the schema of a parameter whose values are all texts."""
    kind, values = schema.get("type"), schema.get("enum", [schema["const"]] if "const" in schema else None)
    return kind == "string" or (kind is None and isinstance(values, list) and all(isinstance(value, str) for value in values))


def _read_untyped(text: str, schema: Arguments) -> object:
    """Returns the value that a tag holds: JSON, or the text itself where the schema wants one or it is no JSON."""
    if is_text(schema):
        return text
    word = text.strip()
    if word in _WORDS:
        return _WORDS[word]
    try:
        return json.loads(word, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


def _write_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
