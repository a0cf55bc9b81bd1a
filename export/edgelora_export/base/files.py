"""Reads JSON and TOML files that a user gives, and reports every failure as one line."""

from __future__ import annotations

import json
import re
import stat
import tomllib
from typing import TYPE_CHECKING, Any

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_LIMIT = 64 << 20  # bytes
_KEY_PARTS = 100  # of one dotted key


def look_up(path: Path) -> bool:
    """True if something lies at a path. Raises InputError for one that the system refuses to look up, such as one too long."""
    try:
        return path.exists()
    except OSError as error:
        raise InputError(f"{path} cannot be looked up ({error.strerror}); check the path") from None


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Reads a JSON object. hint: a phrase that says what needs the file.

    Raises InputError if the file is absent, unreadable, or not an object.
    """
    value = read_parsed(path, json.loads, "JSON", hint)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}, not an object")
    return value


def read_toml(path: Path, hint: str) -> dict[str, Any]:
    """Reads the tables of a TOML file. hint: a phrase that says what needs the file.

    Raises InputError if the file is absent or unreadable.
    """
    value: dict[str, Any] = read_parsed(path, _parse_toml, "TOML", hint)
    return value


def read_parsed(path: Path, parse: Callable[[str], Any], kind: str, hint: str) -> Any:
    """Reads a text file and parses it.

    kind: the format, for errors. hint: a phrase that says what needs the file. Raises InputError if the file is absent,
    unreadable, too large, or refused by parse with a ValueError or a RecursionError.
    """
    try:
        info = path.stat()  # of what a link leads to: hubs keep files behind links
        if not stat.S_ISREG(info.st_mode):
            raise InputError(f"{path} is not a plain file; {hint}")
        if info.st_size > _LIMIT:
            raise InputError(f"{path} has {info.st_size} bytes; {_LIMIT} is the most for {kind}")
        return parse(path.read_text(encoding="utf-8"))
    except InputError:  # which is a ValueError, too
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; {hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable {kind} ({error})") from error


def _parse_toml(text: str) -> dict[str, Any]:
    """Parses TOML without keys of many parts, which tomllib takes quadratic time for."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > _KEY_PARTS and max(part.count(".") for part in re.split(r"[][={},#]", line)) > _KEY_PARTS:
            raise ValueError(f"line {number} has a key of more than {_KEY_PARTS} parts")
    return tomllib.loads(text)
