"""Reads JSON and TOML files that a user gives, and reports every failure as one line."""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING, Any

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Reads a JSON object. hint: a phrase that says what needs the file.

    Raises InputError if the file is absent, unreadable, or not an object.
    """
    value = _read(path, json.loads, "JSON", hint)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}, not an object")
    return value


def read_toml(path: Path, hint: str) -> dict[str, Any]:
    """Reads the tables of a TOML file. hint: a phrase that says what needs the file.

    Raises InputError if the file is absent or unreadable.
    """
    value: dict[str, Any] = _read(path, tomllib.loads, "TOML", hint)
    return value


def _read(path: Path, parse: Callable[[str], Any], kind: str, hint: str) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; {hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable {kind} ({error})") from error
