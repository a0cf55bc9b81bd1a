"""Grammars in llguidance's Lark notation, written rule by rule.

Notation: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from edgelora_runtime.decode.grammar import BLANKS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from edgelora_runtime.tools.declarations import Schema

_SPECIAL = re.compile(r"[\\.^$|?*+()\[\]{}/\-&~#]")


class Lark:
    """A grammar under construction.

    tokens: added tokens by text. llguidance takes some of them for special, which no text matches, so where one stands in a
    literal, both the token and its text are allowed.
    """

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = {text: tokens[text] for text in sorted(tokens, key=len, reverse=True) if text}
        self._rules: dict[str, str] = {}
        self._split = re.compile("|".join(map(re.escape, self._tokens))) if self._tokens else None

    def add(self, expression: str, *, kind: str = "rule", attribute: str = "") -> str:
        """Adds a rule, or a terminal of kind TEXT, and returns its name. An equal one is not added again."""
        known = next((name for name, other in self._rules.items() if other == attribute + ": " + expression), None)
        if known is not None:
            return known
        name = f"{kind}_{len(self._rules)}"
        self._rules[name] = attribute + ": " + expression
        return name

    def reserve(self) -> str:
        """Returns the name of a rule that define() gives its expression later, for rules that refer to themselves."""
        name = f"rule_{len(self._rules)}"
        self._rules[name] = ""
        return name

    def define(self, name: str, expression: str) -> None:
        self._rules[name] = ": " + expression

    def literal(self, text: str) -> str:
        """Returns an expression for a text. That of an empty text is empty."""
        pieces: list[str] = []
        at = 0
        for found in self._split.finditer(text) if self._split else ():
            pieces += [_quote(text[at : found.start()]), self._mark(found[0])]
            at = found.end()
        return " ".join(filter(None, [*pieces, _quote(text[at:])]))

    def json(self, schema: Schema) -> str:
        """Returns a rule for a JSON text that fits a schema, with whitespace as json_schema allows it."""
        return self.add("%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": BLANKS}}))

    def until(self, end: str, limit: int | None = None) -> str:
        """Returns an expression for any text up to and with `end`. limit: characters of the text before it, at most."""
        count = "*" if limit is None else f"{{0,{limit}}}"
        found = self._split.search(end) if self._split else None
        if found is None:
            return self.add(f"/(?s:.{count}){escape(end)}/", attribute="[lazy]")
        mark, rest = found[0], self.literal(end[found.end() :])
        spelled = self.add(f"/(?s:.{count}){escape(mark)}/", attribute="[lazy]")
        text = self.add(f"/(?s:.{count if limit else '+'})/ & ~/(?s:.*){escape(mark)}(?s:.*)/", kind="TEXT")
        return f"({text}? <[{self._tokens[mark]}]> | {spelled}) {rest}".rstrip()

    def text_without(self, mark: str) -> str:
        """Returns a terminal for a text of one or more characters in which a mark does not occur. Any text if it is empty."""
        without = f" & ~/(?s:.*){escape(mark)}(?s:.*)/" if mark else ""
        return self.add(f"/(?s:.+)/{without}", kind="TEXT")

    def write(self, start: str) -> str:
        """Returns the whole grammar."""
        return "\n".join([f"start: {start}", *(name + expression for name, expression in self._rules.items())]) + "\n"

    def _mark(self, text: str) -> str:
        return f"(<[{self._tokens[text]}]> | {_quote(text)})"


def choose(expressions: Iterable[str]) -> str:
    """Returns an expression for any of several."""
    return "(" + " | ".join(dict.fromkeys(expressions)) + ")"


def escape(text: str) -> str:
    r"""Returns a regular expression that matches a text and nothing else, for use between slashes.

    >>> print(escape("</a>"))
    <\/a>
    """
    return _SPECIAL.sub(lambda found: "\\" + found[0], text).replace("\n", "\\n")


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
