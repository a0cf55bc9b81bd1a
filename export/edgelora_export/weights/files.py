"""Reads the JSON and TOML files that a user gives, every failure as one line."""

from __future__ import annotations

import json
import tomllib
from typing import TYPE_CHECKING, Any

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """A JSON object; InputError where the file is absent (the hint says what needs it), unreadable, or no object."""
    value = _read(path, json.loads, "JSON", hint)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}, not an object")
    return value


def read_toml(path: Path, hint: str) -> dict[str, Any]:
    """A TOML file's tables; InputError where the file is absent (the hint says what needs it) or unreadable."""
    value: dict[str, Any] = _read(path, tomllib.loads, "TOML", hint)
    return value


def _read(path: Path, parse: Callable[[str], Any], kind: str, hint: str) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; {hint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable {kind} ({error})") from error
