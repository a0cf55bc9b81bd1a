"""Reading of an answer that is still being written: literals, names and values, or a request for more text."""

from __future__ import annotations

import json
import re

_NAME = re.compile(r"[\w.\-]*")
_BLANK = re.compile(r"\s*")


class Incomplete(Exception):  # noqa: N818 - a signal, not an error
    """A sign that the text so far is the start of a call."""


class Malformed(Exception):  # noqa: N818 - a signal, not an error
    """A sign that the text is no call."""


def skip_blanks(text: str, at: int) -> int:
    """Returns the first position from `at` that holds no whitespace."""
    found = _BLANK.match(text, at)
    assert found is not None
    return found.end()


def read_literal(text: str, at: int, literal: str) -> int:
    """Returns the position after a literal.

    Models vary whitespace, so that before a word of the literal may be any, or none. Whitespace at the literal's end is taken
    as it is written there, since a value follows. Raises Incomplete if the text ends within the literal, Malformed if it differs.
    """
    for word in literal.split():
        at = skip_blanks(text, at)
        if not text.startswith(word, at):
            raise Incomplete if word.startswith(text[at:]) else Malformed
        at += len(word)
    end = literal[len(literal.rstrip()) :]
    if end and len(text) - at < len(end) and end.startswith(text[at:]):
        raise Incomplete
    return at + len(end) if end and text.startswith(end, at) else at


def read_name(text: str, at: int) -> tuple[str, int]:
    """Reads the name of a function or parameter. Returns it with the position after it."""
    at = skip_blanks(text, at)
    found = _NAME.match(text, at)
    assert found is not None
    if found.end() == len(text):
        raise Incomplete
    if not found[0]:
        raise Malformed
    return found[0], found.end()


def read_until(text: str, at: int, end: str) -> tuple[str, int]:
    """Reads a text up to the words of `end`. Returns it without the whitespace that `end` starts with, and the position after."""
    word = end.strip()
    found = text.find(word, at)
    if found < 0:
        raise Incomplete
    lead, rest = end[: len(end) - len(end.lstrip())], end[len(end.rstrip()) :]
    value, after = text[at:found], found + len(word)
    return value.removesuffix(lead) if lead else value, after + len(rest) if rest and text.startswith(rest, after) else after


def read_json(text: str, at: int) -> tuple[object, int]:
    """Reads a JSON value. Returns it with the position after it."""
    at = skip_blanks(text, at)
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError):
        raise Incomplete from None
    if end == len(text) and not isinstance(value, dict | list | str):  # a number may go on
        raise Incomplete
    return value, end


class JsonScanner:
    """A scanner that finds the end of a JSON object or list, character by character.

    depth: open braces and brackets.
    """

    def __init__(self) -> None:
        self.depth = 0
        self._in_text = False
        self._escaped = False

    def scan(self, text: str, floor: int = 0) -> int:
        """Returns the position after the character that closes depth `floor`, or -1 if the text ends before."""
        for at, character in enumerate(text):
            if self._in_text:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_text = False
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth <= floor:
                    return at + 1
        return -1
