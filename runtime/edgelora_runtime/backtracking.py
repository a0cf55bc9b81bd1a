r"""The work that a regular expression from a file may cause, counted before it runs.

Engines that go back try one path after another through a pattern. (a+)+ has exponentially many on a text of a's, and a+a+b has
as many as the text's length squared. Here the paths are counted from the pattern alone, as a polynomial of the text's length, and
a pattern whose paths are no polynomial is refused. Patterns are read as Python's re and Oniguruma, the engine of tokenizers, both
read them: what one of them reads in its own way is refused too.
"""

from __future__ import annotations

import math
import re
from collections import Counter

_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?\w+\}|u[0-9A-Fa-f]{4}|x[0-9A-Fa-f]{2}|x\{[0-9A-Fa-f]+\}|[sSdDwWbBAzZnrtfvaeh]|[^A-Za-z0-9])", re.DOTALL
)
_POSIX = re.compile(r"\[:\^?\w+:\]")
_QUANTIFIER = re.compile(r"[*+?]|\{(\d+)(,?)(\d*)\}|\{,(\d+)\}")
_GROUP = re.compile(r"\?(?::|>|=|!|<=|<!|P?<[A-Za-z_]\w*>|[im-]+[:)])")
_CAPTURING = re.compile(r"\?(?::|P<[A-Za-z_]\w*>)")  # without what looks around, and without flags
_MOST_TIMES = 1 << 12  # of a bounded repetition, and of degrees
_MANY = 1 << 64  # paths that need no exact count
_DEEPEST = 40  # groups in groups

Paths = Counter[int]
"""Paths by degree: {0: 2, 1: 3} are 2 + 3 L, where L is the length of the text."""


class PatternError(ValueError):
    """A pattern that may take long, or that cannot be counted. The message is the rest of a sentence about it."""


def count_paths(pattern: str, *, plain: bool = False) -> Paths:
    r"""Counts the paths through a pattern by degree.

    plain: for Python's re, with groups alone: nothing that looks around, refers back or sets flags, and no group that repeats.
    Raises PatternError.

    >>> dict(count_paths("a?(b|c)+d"))
    {1: 4}
    >>> count_paths("(a+)+")
    Traceback (most recent call last):
    edgelora_runtime.backtracking.PatternError: repeats a group of repetitions and may take exponential time
    """
    reader = _Reader(pattern, plain)
    paths = reader.read_choice()
    while reader.at < len(pattern):  # a bracket that closes nothing, which the engine refuses, or reads as itself
        reader.at += 1
        paths = multiply_paths(paths, reader.read_choice())
    return paths


def bound_paths(paths: Paths, length: int) -> int:
    """Returns how many paths there may be in a text of a length: d repetitions share it in (L + d)! / L! d! ways."""
    return sum(count * math.comb(length + degree, degree) for degree, count in paths.items())


def multiply_paths(left: Paths, right: Paths) -> Paths:
    """Returns the paths through one pattern behind another."""
    product = Paths()
    for one, some in left.items():
        for other, more in right.items():
            product[one + other] = min(product[one + other] + some * more, _MANY)
    return product


class _Reader:
    def __init__(self, pattern: str, plain: bool) -> None:
        self._pattern = pattern
        self._plain = plain
        self._depth = 0
        self.at = 0

    def read_choice(self) -> Paths:
        """Reads up to a bracket that closes, or to the end."""
        paths = self._read_sequence()
        while self._see("|"):
            self.at += 1
            paths = paths + self._read_sequence()
        return paths

    def _read_sequence(self) -> Paths:
        paths = Paths({0: 1})
        while self.at < len(self._pattern) and not self._see("|") and not self._see(")"):
            paths = multiply_paths(paths, self._read_part())
        return paths

    def _read_part(self) -> Paths:
        is_group = self._see("(")
        if is_group:
            paths = self._read_group()
        else:
            paths = Paths({0: 1})
            if self._see("\\"):
                self._read_escape()
            elif self._see("["):
                self._read_class()
            else:
                self.at += 1
        while found := _QUANTIFIER.match(self._pattern, self.at):
            self.at = found.end()
            if found[0] != "?" and is_group and self._plain:
                raise PatternError("repeats a group, which may take exponential time")
            paths = _repeat(paths, found, is_group)
            if found[0][0] != "{" and self.at < len(self._pattern) and self._pattern[self.at] in "?+":
                self.at += 1  # lazy, or without going back
            elif self._see("?"):
                self.at += 1
        return paths

    def _read_group(self) -> Paths:
        self.at += 1
        if self._see("?"):
            found = (_CAPTURING if self._plain else _GROUP).match(self._pattern, self.at)
            if found is None:
                raise PatternError(
                    f"has a group that starts with {self._pattern[self.at - 1 : self.at + 3]!r}, which is not known"
                )
            self.at = found.end()
            if found[0][-1] == ")":  # flags for what follows
                return Paths({0: 1})
        self._depth += 1
        if self._depth > _DEEPEST:
            raise PatternError(f"has groups in groups deeper than {_DEEPEST}")
        paths = self.read_choice()
        self._depth -= 1
        self.at += 1
        return paths

    def _read_escape(self) -> None:
        found = _ESCAPE.match(self._pattern, self.at)
        if found is None:
            raise PatternError(f"refers back, or has an escape that is not known: {self._pattern[self.at : self.at + 2]!r}")
        self.at = found.end()

    def _read_class(self) -> None:
        """Reads a class of characters. Oniguruma has classes in classes, which Python reads as characters."""
        depth = 0
        while self.at < len(self._pattern):
            if self._see("\\"):
                self._read_escape()
                continue
            if not self._plain and (found := _POSIX.match(self._pattern, self.at)) and depth:
                self.at = found.end()
                continue
            if self._see("[") and (not depth or not self._plain):
                depth += 1
                self.at += 1 + (self._pattern[self.at + 1 : self.at + 2] == "^")
                self.at += self._see("]")  # at the start it is a character
                continue
            depth -= self._see("]")
            self.at += 1
            if not depth:
                return

    def _see(self, character: str) -> bool:
        return self._pattern[self.at : self.at + 1] == character


def _repeat(paths: Paths, quantifier: re.Match[str], is_group: bool) -> Paths:
    first = quantifier[0]
    if first == "?":
        return paths + Paths({0: 1})
    low = int(quantifier[1] or 0) if first[0] == "{" else 0
    high = int(quantifier[4] or quantifier[3] or (0 if quantifier[2] else low)) if first[0] == "{" else 0
    is_endless = first in "*+" or (bool(quantifier[2]) and not quantifier[3])
    if max(paths) and (is_endless or high > 1):
        raise PatternError("repeats a group of repetitions and may take exponential time")
    choices = paths[0]
    if max(low, high) > _MOST_TIMES:
        raise PatternError(f"repeats more than {_MOST_TIMES} times")
    if is_endless:
        return Paths({1: choices})
    if max(paths):
        return paths  # once, or not at all
    turns = max(high, 1) if is_group else 1  # a group may match nothing, in each of its turns
    return Paths({0: min(choices**high * turns * (max(high - low, 0) + 1), _MANY)})
