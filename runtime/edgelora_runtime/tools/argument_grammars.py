"""Grammars of a call's arguments, in each notation, from the JSON schema of the tool's parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgelora_runtime.tools.lark import choose
from edgelora_runtime.tools.notations import GemmaNotation, PythonNotation, TaggedNotation, find_parameter, is_text

if TYPE_CHECKING:
    from edgelora_runtime.tools.declarations import Schema
    from edgelora_runtime.tools.lark import Lark
    from edgelora_runtime.tools.notations import Notation

_PYTHON_CHARACTER = r"""([^'\\\x00-\x1f]|\\['"\\nrt])"""
_PYTHON_WORDS = {"boolean": '("True" | "False")', "null": '"None"'}
_SCALARS = ("integer", "number", "boolean", "null")
_MOST_DEPTH = 32  # of schemas within schemas


def write_arguments(notation: Notation, schema: Schema, lark: Lark) -> str:
    """Returns an expression for arguments that fit a schema.

    In JSON they fit all of it. The other notations are held to the parameters' names, to which are required, to types, choices,
    and the lengths of texts and of Gemma's lists.
    """
    if isinstance(notation, TaggedNotation):
        return _write_tags(notation, schema, lark)
    if isinstance(notation, GemmaNotation):
        return _GemmaGrammar(notation, lark, schema).write(schema, 0)
    if isinstance(notation, PythonNotation):
        fields = {name: f'"{name}=" {_write_python(schema, name, lark)}' for name in _properties(schema)}
        return f'"(" {_join_fields(fields, _required(schema), ", ", lark)} ")"'
    return lark.json(schema)


def _write_tags(notation: TaggedNotation, schema: Schema, lark: Lark) -> str:
    required = _required(schema)
    pieces: list[str] = []
    for name in _properties(schema):
        parameter = find_parameter(schema, name)
        head = lark.literal(f"{notation.before}{name}{notation.between}")
        choices = _choices(parameter)
        if choices is not None:
            values = (value if isinstance(value, str) else json.dumps(value) for value in choices)
            value = f"{choose(map(lark.literal, values))} {lark.literal(notation.after)}"
        elif is_text(parameter):
            limit = parameter.get("maxLength")
            value = lark.until(notation.after, limit if isinstance(limit, int) else None)
        else:
            value = f"{lark.json(parameter)} {lark.literal(notation.after)}"
        pieces.append(f"{head} {value}" if name in required else f"({head} {value})?")
    return lark.add(" ".join(pieces) or '""')


def _write_python(schema: Schema, name: str, lark: Lark) -> str:
    parameter = find_parameter(schema, name)
    choices = _choices(parameter)
    if choices is not None:
        return choose(lark.literal(PythonNotation.write_value(value)) for value in choices)
    kinds = _kinds(parameter)
    if "string" in kinds and len(kinds) == 1:
        return _write_python_text(parameter, lark)
    if kinds and all(kind in (*_SCALARS, "string") for kind in kinds):
        texts = {"string": _write_python_text(parameter, lark), **_PYTHON_WORDS}
        return choose(texts[kind] if kind in texts else lark.json({**parameter, "type": kind}) for kind in kinds)
    return lark.json(parameter)


def _write_python_text(schema: Schema, lark: Lark) -> str:
    limit = schema.get("maxLength")
    return lark.add(f"/'{_PYTHON_CHARACTER}{{0,{limit if isinstance(limit, int) else ''}}}'/", kind="TEXT")


class _GemmaGrammar:
    """Values in Gemma's braces. root: the schema that references start from."""

    def __init__(self, notation: GemmaNotation, lark: Lark, root: Schema) -> None:
        self._notation = notation
        self._lark = lark
        self._root = root
        self._named: dict[str, str] = {}  # rules by reference
        self._any: str | None = None

    def write(self, schema: Schema, depth: int) -> str:
        if depth > _MOST_DEPTH:
            return self._write_any()
        reference = schema.get("$ref")
        if isinstance(reference, str):
            return self._write_reference(reference, depth)
        choices = _choices(schema)
        if choices is not None:
            return choose(self._lark.literal(self._notation.write_value(value)) for value in choices)
        options = schema.get("anyOf") or schema.get("oneOf")
        if isinstance(options, list) and options:
            return choose(self.write(option, depth + 1) for option in options if isinstance(option, Mapping))
        kinds = _kinds(schema)
        return choose(self._write_kind(kind, schema, depth) for kind in kinds) if kinds else self._write_any()

    def _write_kind(self, kind: str, schema: Schema, depth: int) -> str:
        if kind in _SCALARS:
            return self._lark.json({**schema, "type": kind})
        if kind == "string":
            limit = schema.get("maxLength")
            end = self._lark.until(self._notation.quote, limit if isinstance(limit, int) else None)
            return f"{self._lark.literal(self._notation.quote)} {end}"
        if kind == "array":
            items = schema.get("items")
            item = self.write(items, depth + 1) if isinstance(items, Mapping) else self._write_any()
            return _write_list(self._lark.add(item), schema.get("minItems"), schema.get("maxItems"))
        if "properties" not in schema:
            return self._write_object_of_any()
        properties = _properties(schema)
        fields = {name: f'"{name}:" {self.write(properties[name], depth + 1)}' for name in sorted(properties)}
        return f'"{{" {_join_fields(fields, _required(schema), ",", self._lark)} "}}"'

    def _write_reference(self, reference: str, depth: int) -> str:
        if reference not in self._named:
            self._named[reference] = self._lark.reserve()
            found: Any = self._root
            for key in reference.removeprefix("#").strip("/").split("/"):
                found = found.get(key, {}) if isinstance(found, Mapping) and key else found
            expression = self.write(found, depth + 1) if isinstance(found, Mapping) else self._write_any()
            self._lark.define(self._named[reference], expression)
        return self._named[reference]

    def _write_any(self) -> str:
        if self._any is None:
            self._any = self._lark.reserve()
            text = self._write_kind("string", {}, 0)
            values = [text, *(self._lark.json({"type": kind}) for kind in _SCALARS), self._write_kind("array", {}, 0)]
            self._lark.define(self._any, choose([*values, self._write_object_of_any()]))
        return self._any

    def _write_object_of_any(self) -> str:
        field = self._lark.add(f'/[A-Za-z0-9_]{{1,64}}/ ":" {self._write_any()}')
        return f'"{{" ({field} ("," {field})*)? "}}"'


def _write_list(item: str, least: object, most: object) -> str:
    low = least if isinstance(least, int) else 0
    more = f"{{{max(low - 1, 0)},{most - 1 if isinstance(most, int) and most else ''}}}"
    if most == 0:
        return '"[]"'
    items = f'{item} ("," {item}){more}'
    return f'"[" {items} "]"' if low else f'"[" ({items})? "]"'


def _join_fields(fields: Mapping[str, str], required: set[str], separator: str, lark: Lark) -> str:
    """Returns an expression for fields in their order, with separators between those that are there."""
    names = list(fields)
    following = {True: '""', False: '""'}  # what comes after a field, by whether one stands before it
    for name in reversed(names):
        rules = {}
        for started in (True, False):
            head = f"{json.dumps(separator)} {fields[name]}" if started else fields[name]
            taken = f"{head} {following[True]}"
            rules[started] = lark.add(taken if name in required else f"{taken} | {following[started]}")
        following = rules
    return following[False]


def _properties(schema: Schema) -> Mapping[str, Schema]:
    found = schema.get("properties")
    if not isinstance(found, Mapping):
        return {}
    return {name: value if isinstance(value, Mapping) else {} for name, value in found.items()}


def _required(schema: Schema) -> set[str]:
    found = schema.get("required")
    return set(found) if isinstance(found, list | tuple) else set()


def _choices(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return list(values) if isinstance(values, list | tuple) and values else None


def _kinds(schema: Schema) -> list[str]:
    found = schema.get("type")
    return [found] if isinstance(found, str) else [kind for kind in found or () if isinstance(kind, str)]
