"""Grammars of whole answers: a thought, then text, JSON or calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgelora_runtime.tools.argument_grammars import write_arguments
from edgelora_runtime.tools.lark import Lark, choose
from edgelora_runtime.tools.layout import ID

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora_runtime.tools.declarations import Schema
    from edgelora_runtime.tools.detection import ThoughtMarks
    from edgelora_runtime.tools.layout import CallLayout

_NEW_ID = "/[a-zA-Z0-9]{9}/"  # as Mistral's templates require
_GAP = r"/[ \n]{1,4}/"  # between a thought and what follows


@dataclass(frozen=True)
class AnswerForm:
    """What an answer may be.

    calls: schemas of the functions that it may call, by name. is_call: it holds a call and nothing else. several: it may hold
    more than one. json_schema: what it must fit if it holds none. thought: whether one is open when it starts, or may come first.
    """

    calls: Mapping[str, Schema]
    is_call: bool
    several: bool
    json_schema: Schema | None
    thought: Literal["open", "possible", "none"]


def write_grammar(form: AnswerForm, layout: CallLayout, thoughts: ThoughtMarks | None, tokens: Mapping[str, int]) -> str | None:
    """Returns a grammar in llguidance's notation, or None if any text is an answer."""
    lark = Lark(tokens)
    calls = _write_calls(form, layout, lark) if form.calls else None
    plain = None if form.json_schema is None else lark.json(form.json_schema)
    if calls is None and plain is None:
        return None if not layout.trigger else _write_text(layout, form, thoughts, lark)
    thought = _write_thought(form, thoughts, lark)
    if form.is_call and calls is not None:
        return lark.write(f"{thought} {_write_opening(layout, lark)} {calls}")
    if plain is not None:
        others = [] if calls is None else [f"{_write_opening(layout, lark)} {calls}"]
        return lark.write(f"{thought} {choose([plain, *others])}")
    assert calls is not None
    return lark.write(f"{thought} {_write_text_or_calls(layout, calls, lark)}")


def _write_text(layout: CallLayout, form: AnswerForm, thoughts: ThoughtMarks | None, lark: Lark) -> str:
    """Returns the grammar of an answer that holds no call."""
    return lark.write(f"{_write_thought(form, thoughts, lark)} {lark.text_without(layout.trigger)}?")


def _write_text_or_calls(layout: CallLayout, calls: str, lark: Lark) -> str:
    if not layout.trigger:  # a call is an answer that starts with a JSON object
        text = lark.add(r"/\s*[^\s{](?s:.*)/", kind="TEXT")
        return choose([f"{text}?", f"{_write_opening(layout, lark)} {calls}"])
    rest = lark.literal(layout.opening[len(layout.trigger) :])
    return choose([f"{lark.text_without(layout.trigger)}?", f"{lark.until(layout.trigger)} {rest} {calls}"])


def _write_opening(layout: CallLayout, lark: Lark) -> str:
    prefixes = "".join(f"{lark.literal(prefix)}? " for prefix in layout.prefixes)
    return prefixes + lark.literal(layout.opening)


def _write_calls(form: AnswerForm, layout: CallLayout, lark: Lark) -> str:
    """Returns an expression for calls, from after the opening on."""
    middle = _write_with_id(layout.middle, lark)
    functions = {name: write_arguments(layout.notation, schema, lark) for name, schema in form.calls.items()}
    call = lark.add(choose(f"{lark.literal(name)} {middle} {arguments}" for name, arguments in functions.items()))
    closing = _write_with_id(layout.closing, lark)
    if layout.separator is None or not form.several:
        return f"{call} {closing}"
    return f"{call} ({_write_with_id(layout.separator, lark)} {call})* {closing}"


def _write_with_id(text: str, lark: Lark) -> str:
    pieces = [lark.literal(piece) for piece in text.split(ID)]
    return f" {_NEW_ID} ".join(pieces).strip()


def _write_thought(form: AnswerForm, thoughts: ThoughtMarks | None, lark: Lark) -> str:
    if thoughts is None or form.thought == "none":
        return ""
    ending = f"{lark.until(thoughts.closing)} {_GAP}?"
    return ending if form.thought == "open" else f"({lark.literal(thoughts.opening)} {ending})?"
