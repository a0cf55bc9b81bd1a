"""Checks of arguments: a value of a wrong type ends in one line that names the call and says what to use."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

from edgelora_runtime.errors import UsageError

_SHOWN = 80  # characters of a value in a message


def is_whole(value: object) -> TypeGuard[int]:
    """True for whole numbers, numpy's among them, but not for True and False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """True for real numbers that a float can hold, infinity among them, but not for NaN, True and False."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return not math.isnan(float(value))
    except (OverflowError, ValueError):
        return False


def show(value: object) -> str:
    """Shows a value in a message, on one printable line. Long ones are cut."""
    from reprlib import Repr

    short = Repr()
    short.maxstring = short.maxother = short.maxlong = _SHOWN
    try:
        text = short.repr(value)
    except Exception:  # a number of too many digits, or a class with a broken __repr__
        text = type(value).__name__
    return "".join(filter(str.isprintable, text))[:_SHOWN]


def check_argument(call: str, name: str, value: object, *, holds: bool, allowed: str) -> None:
    """Raises UsageError for an argument that cannot be used. call: the public call's name. allowed: what to use."""
    if not holds:
        raise UsageError(f"{call}: {name} = {show(value)}: use {allowed}")


def check_whole(call: str, name: str, value: object, least: int, most: int | None = None) -> int:
    """Returns a whole number from `least` to `most`. Raises UsageError for anything else."""
    holds = is_whole(value) and least <= value and (most is None or value <= most)
    allowed = f"a whole number, {least} or more" if most is None else f"a whole number from {least} to {most}"
    check_argument(call, name, value, holds=holds, allowed=allowed)
    return int(value)  # type: ignore[call-overload, no-any-return]


def check_path(call: str, name: str, value: object) -> Path:
    """Returns the path that a text or a path object names. Raises UsageError for anything else."""
    path: Any = None
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
    check_argument(call, name, value, holds=isinstance(path, str) and _is_name(path), allowed="a path")
    return Path(path)


def _is_name(path: str) -> bool:
    """True for a text that the system can take as a path."""
    try:
        return path != "" and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # a lone surrogate
        return False


def check_kind(call: str, name: str, value: object, kind: Any, allowed: str) -> None:
    """Raises UsageError for an argument that is neither of that kind nor None. kind: as isinstance() takes it."""
    check_argument(call, name, value, holds=value is None or isinstance(value, kind), allowed=allowed)
