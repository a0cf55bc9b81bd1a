"""Reads JSON strictly: no repeated keys, no NaN, and every value of the type that a dataclass says."""

from __future__ import annotations

import json
import sys
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal

from edgelora_runtime.errors import IntegrityError


def read_strictly(raw: bytes, document: str) -> Any:
    """Parses JSON text. Raises IntegrityError for what is not JSON, and for objects that repeat a key."""
    try:
        return json.loads(raw.decode(), parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeats)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{document} is not valid JSON ({error})") from error


def decode(kind: Any, value: Any, document: str, path: str = "", *, skip_unknown: bool) -> Any:
    """Returns a JSON value as an annotated type: a dataclass, or what its fields may be.

    document: its name in errors. path: where in it the value stands. skip_unknown: objects may have keys that the type lacks.
    Raises IntegrityError with the path of a value of another type.
    """

    def fail(expected: str) -> typing.NoReturn:
        raise IntegrityError(f"{document}: {path or 'top level'} should be {expected}, not {json.dumps(value)[:80]}")

    if is_dataclass(kind):
        if not isinstance(value, dict):
            fail("an object")
        hints = _read_hints(typing.cast("Any", kind))
        known = {item.name: item for item in fields(kind)}
        absent = [
            name
            for name, item in known.items()
            if name not in value and item.default is MISSING and item.default_factory is MISSING
        ]
        unknown = [] if skip_unknown else sorted(set(value) - set(known))
        if absent or unknown:
            said = [f"{word} {', '.join(names)}" for word, names in (("lacks", absent), ("has unknown", unknown)) if names]
            raise IntegrityError(f"{document}: {path or 'top level'} {' and '.join(said)}")
        given = {name: item for name, item in value.items() if name in known}
        taken = {
            name: decode(hints[name], item, document, f"{path}.{name}".lstrip("."), skip_unknown=skip_unknown)
            for name, item in given.items()
        }
        return kind(**taken)  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        if not isinstance(value, dict):
            fail("an object")
        return {
            key: decode(arguments[1], item, document, f"{path}[{key!r}]", skip_unknown=skip_unknown)
            for key, item in value.items()
        }
    if origin is tuple:
        if not isinstance(value, list):
            fail("a list")
        return tuple(
            decode(arguments[0], item, document, f"{path}[{i}]", skip_unknown=skip_unknown) for i, item in enumerate(value)
        )
    if origin is Literal:
        if value not in arguments:
            fail(" or ".join(map(repr, arguments)))
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else decode(arguments[0], value, document, path, skip_unknown=skip_unknown)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:  # 1e999 is read as infinity, and an int may be larger than any float
            fail("a finite number")
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        fail(f"a {kind.__name__}")
    if kind is int and not 0 <= value < 1 << 53:
        fail("a whole number from 0 to 2^53")
    return value


@cache
def _read_hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)  # compiles each annotation anew


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object repeats a key")
    return value


def refuse_surrogates(raw: bytes, value: object) -> None:
    """Raises ValueError if a JSON value, parsed from UTF-8, has half of a surrogate pair in a text."""
    if rb"\ud" not in raw.lower():  # only an escape makes one
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds \\u{ord(error.object[error.start]):04x}, half of a surrogate pair") from None
