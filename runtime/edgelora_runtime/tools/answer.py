"""Parsing of an answer into a thought, text and tool calls, while it is being written."""

from __future__ import annotations

import json
import re
import secrets
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_runtime.tools.layout import ToolCall
from edgelora_runtime.tools.reading import Incomplete, JsonScanner, Malformed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgelora_runtime.tools.declarations import Schema
    from edgelora_runtime.tools.detection import ThoughtMarks
    from edgelora_runtime.tools.layout import CallLayout, ReadCall

_ID_CHARACTERS = string.ascii_letters + string.digits
# The start of a call that is one JSON object, up to its arguments.
_HEAD = re.compile(r'\s*\[?\s*\{\s*"name"\s*:\s*"([\w.\-]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class TextDelta:
    """A further piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class ThoughtDelta:
    """A further piece of the thought before the answer, which OpenAI-like APIs call reasoning_content."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """A further piece of a call's arguments, which are the text of a JSON object.

    index: of the call in the answer, from 0. id, name: in the call's first piece only.
    """

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


Delta = TextDelta | ThoughtDelta | CallDelta


@dataclass(frozen=True)
class Answer:
    """A parsed answer.

    thought: empty if there is none. A call that was cut off is the last one, and its arguments are no JSON.
    """

    text: str
    thought: str
    calls: tuple[ToolCall, ...]


def make_id() -> str:
    """Returns a random id for a call: nine letters and digits, the form that Mistral's templates require and others take."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))


class AnswerParser:
    """A parser that takes an answer piece by piece.

    layout: of calls, or None for calls to stay text. thoughts: the marks of thoughts, or None. schemas: those of the functions'
    arguments by name. in_thought: the prompt ended with an opened thought. new_id: makes ids for calls without.

    Text that could become a mark is held back until it is known. So is whitespace that could stand before one, since it belongs
    to the layout. What looks like a call but is none stays text, so nothing is lost. A function that is none of the tools is a
    call nevertheless.
    """

    def __init__(
        self,
        layout: CallLayout | None,
        thoughts: ThoughtMarks | None = None,
        schemas: Mapping[str, Schema] | None = None,
        *,
        in_thought: bool = False,
        new_id: Callable[[], str] = make_id,
    ) -> None:
        self._layout = layout
        self._thoughts = thoughts
        self._schemas = schemas or {}
        self._new_id = new_id
        self._held = ""  # text that was pushed and is not yet known for what it is
        self._deltas: list[Delta] = []
        self._calls = 0
        self._drops_blanks = in_thought  # whitespace comes next that belongs to the layout
        self._streamed: _StreamedArguments | None = None
        self._step = self._read_thought if in_thought else self._read_start

    def push(self, text: str) -> list[Delta]:
        """Takes the next piece of the answer. Returns what is known of it."""
        self._held += text
        return self._run()

    def finish(self) -> list[Delta]:
        """Returns the rest, after the last push()."""
        self._run()
        if self._calls and self._layout is not None and self._layout.opening.startswith(self._held.strip()):
            self._held = ""  # the mark of a call that was cut off before its name
        if self._streamed is None and self._held:
            is_thought = self._step == self._read_thought
            if self._step != self._read_start or self._held.strip():
                self._show(self._held.rstrip() if is_thought else self._held, is_thought=is_thought)
            self._held = ""
        return self._take()

    def parse(self, text: str) -> Answer:
        """Parses a whole answer."""
        return join_deltas([*self.push(text), *self.finish()])

    def _run(self) -> list[Delta]:
        while self._held and self._step():
            pass
        return self._take()

    def _take(self) -> list[Delta]:
        taken, self._deltas = self._deltas, []
        return taken

    def _show(self, text: str, *, is_thought: bool = False) -> None:
        if self._drops_blanks:
            text = text.lstrip()
            self._drops_blanks = not text
        if text:
            self._deltas.append(ThoughtDelta(text) if is_thought else TextDelta(text))

    # Each step reads the start of what is held, and returns False if it needs more.

    def _read_start(self) -> bool:
        """Tells a thought, or a call without a mark, from text."""
        start = self._held.lstrip()
        if self._thoughts is not None:
            mark = self._thoughts.opening
            if start.startswith(mark):
                self._held, self._drops_blanks, self._step = start[len(mark) :], True, self._read_thought
                return True
            if mark.startswith(start):
                return False
        if not start:
            return False
        if self._layout is not None and not self._layout.trigger:
            return self._read_bare_start(self._layout, start)
        self._step = self._read_text
        return True

    def _read_bare_start(self, layout: CallLayout, start: str) -> bool:
        """Tells a call without a mark from text, by the brace that it starts with."""
        for prefix in layout.prefixes:
            if len(start) <= len(prefix) and prefix.startswith(start):
                return False
            if start.startswith(prefix):
                self._held = start = start.removeprefix(prefix)
        self._step = self._read_call if start.lstrip().startswith("{") else self._read_text
        return True

    def _read_thought(self) -> bool:
        assert self._thoughts is not None
        before, found, after = self._held.partition(self._thoughts.closing)
        if found:
            self._show(before.rstrip(), is_thought=True)
            self._held, self._drops_blanks = after.lstrip(), True
            self._step = self._read_start if self._layout is not None and not self._layout.trigger else self._read_text
            return True
        return self._show_known(self._thoughts.closing, is_thought=True)

    def _read_text(self) -> bool:
        trigger = "" if self._layout is None else self._layout.trigger
        at = self._held.find(trigger) if trigger else -1
        if at < 0:
            return self._show_known(trigger)
        self._show(self._held[:at].rstrip())
        self._held, self._step = self._held[at:], self._read_call
        return True

    def _read_call(self) -> bool:
        """Reads the first call after text."""
        layout = self._layout
        assert layout is not None
        if layout.is_object and not layout.has_late_id:
            head = _HEAD.match(self._held.lstrip().removeprefix(layout.trigger))
            if head is not None:
                return self._stream_call(self._held.lstrip().removeprefix(layout.trigger), head)
        try:
            call = layout.read_first(self._held, self._schemas)
        except Incomplete:
            if not layout.end_mark or layout.end_mark not in self._held or not layout.is_object:
                return False
        except Malformed:
            pass
        else:
            return self._end_call(call)
        shown = layout.trigger or self._held  # no call: its mark is text, and so is a whole answer without marks
        self._show(shown)
        self._held, self._step = self._held.removeprefix(shown), self._read_text
        return True

    def _stream_call(self, text: str, head: re.Match[str]) -> bool:
        """Starts a call whose name is known, and whose arguments can be passed on as they come."""
        self._deltas.append(CallDelta(self._calls, "", self._new_id(), head[1]))
        self._streamed = _StreamedArguments(self._calls)
        self._calls += 1
        self._held, self._step = text[head.end() :], self._read_arguments
        return True

    def _read_arguments(self) -> bool:
        assert self._streamed is not None
        piece, self._held = self._streamed.take(self._held)
        if piece:
            self._deltas.append(CallDelta(self._streamed.index, piece))
        if not self._streamed.ended:
            return False
        self._streamed, self._step = None, self._read_after_call
        return True

    def _end_call(self, call: ReadCall) -> bool:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        self._deltas.append(CallDelta(self._calls, arguments, call.id or self._new_id(), call.name))
        self._calls += 1
        self._held, self._step = self._held[call.end :], self._read_after_call
        return True

    def _read_after_call(self) -> bool:
        """Reads a further call, or the end of the calls."""
        layout = self._layout
        assert layout is not None
        if layout.is_object and not layout.has_late_id and (joined := re.match(r"\s*[,;]?\s*(?=\{)", self._held)):
            rest = self._held[joined.end() :]
            if head := _HEAD.match(rest):
                return self._stream_call(rest, head)
        try:
            following = layout.read_next(self._held, self._schemas)
        except Incomplete:
            return False
        if not isinstance(following, int):
            return self._end_call(following)
        self._held, self._drops_blanks, self._step = self._held[following:], True, self._read_text
        return True

    def _show_known(self, mark: str, *, is_thought: bool = False) -> bool:
        """Shows what can neither become a mark nor be whitespace before one."""
        text = self._held
        keep = next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
        cut = len(text) - keep
        if mark:
            cut = len(text[:cut].rstrip())
        self._held = text[cut:]
        self._show(text[:cut], is_thought=is_thought)
        return False


class _StreamedArguments:
    """The arguments of a call that is one JSON object, passed on as they come. ended: the object has been closed."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.ended = False
        self._scanner = JsonScanner()
        self._outer: JsonScanner | None = None  # after the arguments: scans for the end of the call's object

    def take(self, text: str) -> tuple[str, str]:
        """Returns the part of a text that belongs to the arguments, and what follows the call."""
        piece = ""
        if self._outer is None:
            end = self._scanner.scan(text)
            if end < 0:
                return text, ""
            piece, text = text[:end], text[end:]
            self._outer = JsonScanner()
            self._outer.depth = 1
        end = self._outer.scan(text)
        if end < 0:
            return piece, ""
        self.ended = True
        return piece, text[end:]


def join_deltas(deltas: list[Delta]) -> Answer:
    """Returns the answer that pieces make up."""
    text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    thought = "".join(delta.text for delta in deltas if isinstance(delta, ThoughtDelta))
    pieces = [delta for delta in deltas if isinstance(delta, CallDelta)]
    calls = []
    for first in (piece for piece in pieces if piece.name is not None):
        arguments = "".join(piece.arguments for piece in pieces if piece.index == first.index)
        calls.append(ToolCall(first.id or "", first.name or "", arguments))
    return Answer(text, thought, tuple(calls))
