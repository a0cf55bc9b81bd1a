"""The errors that edgelora raises on purpose: one tree, with an exit code for each branch.

EdgeloraError              1
├── UsageError             2, also a ValueError
├── MissingExtraError      2, also an ImportError
├── InputError             3, also a ValueError
├── IntegrityError         4
└── ResourceError          5, also an OSError
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

INTERRUPTED = 130  # exit code of Ctrl-C: 128 + SIGINT, as shells count
TERMINATED = 143  # exit code of SIGTERM: 128 + SIGTERM
BROKEN_PIPE = 141  # exit code of writing to a reader that is gone: 128 + SIGPIPE
LONGEST_MESSAGE = 4000  # characters

_NAMED = {"\n": " ", "\t": " ", "\r": " ", "\v": " ", "\f": " "}


class EdgeloraError(Exception):
    """Base of the tree. The message is one line: what is wrong, which value, and what to do.

    Messages quote names and texts from files of strangers. So every message is made printable here, once for all.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(make_printable(str(message), LONGEST_MESSAGE))


class UsageError(EdgeloraError, ValueError):
    """A call that makes no sense, such as an unknown variant or a temperature below zero."""

    exit_code = 2


class InputError(EdgeloraError, ValueError):
    """A file or value that cannot be used.

    Examples are a broken recipe, a wrong row, or an adapter of another base.
    """

    exit_code = 3


class IntegrityError(EdgeloraError):
    """A bundle that differs from its manifest, or a variant that lost its adapter."""

    exit_code = 4


class ResourceError(EdgeloraError, OSError):
    """Not enough disk or memory. Nothing is left half-written."""

    exit_code = 5


class MissingExtraError(EdgeloraError, ImportError):
    """A missing optional dependency. The message names the extra that installs it."""

    exit_code = 2

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'edgelora[{extra}]'")
        self.package, self.extra = package, extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return type(self), (self.package, self.extra)  # as a worker sends it to its parent


def list_wrong(checks: Iterable[tuple[str, object, bool, str]]) -> list[str]:
    """Returns one message per failed check.

    A check is (name, value, whether the value is allowed, what is allowed).
    """
    return [f"{name} = {value}: use {allowed}" for name, value, holds, allowed in checks if not holds]


def make_printable(text: str, limit: int = 200) -> str:
    """Makes a text from a file fit for a message: one line without anything that a terminal obeys.

    Line breaks and tabs become spaces. Every other character that is not printable becomes its escape, as in Python: control
    characters, marks that turn the direction of writing, lone surrogates. limit: characters to keep. A longer text loses its
    middle, as the end of a message says what to do.
    """
    text = re.sub(r"\s*[\n\r]\s*", " ", text.strip("\n\r"))
    if len(text) > limit:
        kept = max(limit - limit // 3, 1)
        text = f"{text[:kept]}…{text[len(text) - (limit - kept) :]}"
    return text if text.isprintable() else "".join(map(_escape, text))


def suggest_name(unknown: Iterable[object], known: Iterable[str]) -> str:
    """Returns the end of a message about unknown names: "; did you mean 'sql'?", or "" if no known name is near.

    What is no text is near to nothing.
    """
    known = [*known]
    near = (match for name in unknown if isinstance(name, str) for match in get_close_matches(name[:200], known, 1))
    names = " and ".join(map(repr, dict.fromkeys(near)))
    return f"; did you mean {names}?" if names else ""


def _escape(character: str) -> str:
    if character.isprintable():
        return character
    return _NAMED.get(character) or character.encode("unicode_escape").decode("ascii")
