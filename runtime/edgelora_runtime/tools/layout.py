"""The layout of tool calls in an answer: the texts before, between and after their names and arguments."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgelora_runtime.tools.notations import Arguments, JsonNotation, Notation
from edgelora_runtime.tools.reading import Incomplete, Malformed, read_json, read_literal, read_name, skip_blanks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ID = "\x00"  # stands for a call's id in the texts of a layout
_ID = re.compile(r"[\w\-]+")
_OBJECT_HEAD = re.compile(r'(?:\{[^{}]*)?\{\s*"name"\s*:\s*"$')  # how an opening ends where each call is one JSON object
MARK = re.compile(r"<[^<>]*>|\[[A-Z_]+\]")
_ARGUMENTS = ("arguments", "parameters")
_KEYS = {"name", "id", "type", "function", *_ARGUMENTS}


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. arguments: the text of a JSON object. id: nine letters and digits unless the model wrote another."""

    id: str
    name: str
    arguments: str

    def to_message(self) -> dict[str, Any]:
        """Returns the call as it stands in a message's tool_calls.

        The arguments are an object there, since not every template takes text. Those of a call that was cut off stay text.
        """
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": load_arguments(self.arguments)}}


def load_arguments(text: str) -> Any:
    """Returns the object that a call's arguments are the text of, or the text itself if they are no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


@dataclass(frozen=True)
class ReadCall:
    """A call that was read from a text. id: None where the text has none. end: the position after it."""

    name: str
    arguments: Arguments
    id: str | None
    end: int


@dataclass(frozen=True)
class CallLayout:
    """How calls are written: opening, name, middle, arguments, and the closing after the last.

    separator: the text between one call's arguments and the next one's name, or None where an answer holds one call. ID stands
    for the call's id in any of the texts. prefixes: special tokens that may come before a call without a mark, such as Llama's
    `<|python_tag|>`.

    >>> layout = CallLayout('<tool_call>{"name": "', '", "arguments": ', "}</tool_call>")
    >>> layout.write([ToolCall("abcdefghi", "find", '{"city": "Rome"}')])
    '<tool_call>{"name": "find", "arguments": {"city": "Rome"}}</tool_call>'
    """

    opening: str
    middle: str
    closing: str
    separator: str | None = None
    notation: Notation = field(default_factory=JsonNotation)
    prefixes: tuple[str, ...] = ()

    @property
    def head(self) -> str:
        """The opening without the start of a call's JSON object."""
        return _OBJECT_HEAD.sub("", self.opening)

    @property
    def is_object(self) -> bool:
        """True where each call is one JSON object with its name and arguments."""
        return self.head != self.opening

    @property
    def trigger(self) -> str:
        """The mark that starts calls, or nothing where an answer that starts with a JSON object is a call."""
        found = MARK.match(self.head)
        return found[0] if found else self.head.rstrip().rstrip("[").rstrip()

    @property
    def end_mark(self) -> str:
        """The mark after the last call, or nothing."""
        after = self.closing.rpartition("}")[2].strip().removeprefix("]") if self.is_object else self.closing
        return after.strip()

    @property
    def has_late_id(self) -> bool:
        """True where a call's id stands after its arguments."""
        return ID in self.closing

    @property
    def texts(self) -> str:
        """All texts that can stand in an answer, for a search of special tokens."""
        return "\n".join((self.opening, self.middle, self.separator or "", self.closing, self.notation.marks, *self.prefixes))

    def write(self, calls: Sequence[ToolCall]) -> str:
        """Returns calls as the template writes them."""
        pieces: list[str] = []
        for at, call in enumerate(calls):
            before = self.opening if at == 0 else self.separator or self.closing + self.opening
            last = calls[at - 1] if at and self.has_late_id else call
            arguments = self.notation.write(json.loads(call.arguments))
            pieces += [before.replace(ID, last.id), call.name, self.middle.replace(ID, call.id), arguments]
        return "".join(pieces) + (self.closing.replace(ID, calls[-1].id) if calls else "")

    def read_first(self, text: str, schemas: Mapping[str, Arguments]) -> ReadCall:
        """Reads the call that a text starts with.

        schemas: those of the arguments by function. Raises Incomplete if the text is the start of a call, Malformed if it is
        none.
        """
        if not self.is_object:
            return self._read_named(text, read_literal(text, 0, self.opening), schemas)
        at = skip_blanks(text, read_literal(text, 0, self.trigger))
        return self.read_object(text, skip_blanks(text, at + 1) if text.startswith("[", at) else at)

    def read_next(self, text: str, schemas: Mapping[str, Arguments]) -> ReadCall | int:
        """Reads what follows a call: another one, or the end of the calls, of which the position after it is returned.

        Raises Incomplete if more text is needed to tell.
        """
        if self.is_object:
            return self._read_next_object(text)
        if self.separator is not None and not self.separator.endswith(self.opening):
            try:
                return self._read_named(text, read_literal(text, 0, self.separator), schemas)
            except Malformed:
                pass
        try:
            return read_literal(text, 0, self.closing.rstrip())
        except Malformed:
            return 0

    def read_object(self, text: str, at: int) -> ReadCall:
        """Reads a call that is one JSON object, whatever the order of its keys."""
        if at == len(text):
            raise Incomplete
        if text[at] != "{":
            raise Malformed
        if (first := re.compile(r'\{\s*(?:"(\w*)"|[^\s"])').match(text, at)) and first[1] not in _KEYS:
            raise Malformed
        value, end = read_json(text, at)
        assert isinstance(value, dict)
        inner = value["function"] if isinstance(value.get("function"), dict) else value
        name = inner.get("name")
        given = next((inner[key] for key in _ARGUMENTS if key in inner), None)
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError):
                raise Malformed from None
        if not isinstance(name, str) or not isinstance(given, dict):
            raise Malformed
        written = value.get("id")
        return ReadCall(name, given, written if isinstance(written, str) else None, end)

    def _read_next_object(self, text: str) -> ReadCall | int:
        at = skip_blanks(text, 0)
        if at == len(text):
            raise Incomplete
        joined = text[at] in ",;"
        after = skip_blanks(text, at + 1) if joined else at
        if joined and after == len(text):
            raise Incomplete
        if text.startswith("{", after):
            try:
                return self.read_object(text, after)
            except Malformed:
                return 0
        if text.startswith("]", at):
            at = skip_blanks(text, at + 1)
        if not self.end_mark:
            return at
        try:
            return read_literal(text, at, self.end_mark)
        except Malformed:
            return at

    def _read_named(self, text: str, at: int, schemas: Mapping[str, Arguments]) -> ReadCall:
        name, at = read_name(text, at)
        before, found, after = self.middle.partition(ID)
        at = read_literal(text, at, before)
        written = None
        if found:
            match = _ID.match(text, at)
            if match is None or match.end() == len(text):
                raise Incomplete if at == len(text) or match else Malformed
            written, at = match[0], read_literal(text, match.end(), after)
        try:
            arguments, end = self.notation.read(text, at, schemas.get(name, {}))
        except RecursionError:
            raise Malformed from None
        return ReadCall(name, arguments, written, end)
