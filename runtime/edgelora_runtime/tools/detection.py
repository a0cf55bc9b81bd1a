"""Detection of a template's call layout: it renders a conversation with calls, and finds how they were written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelora_runtime.bundle.messages import check_chat
from edgelora_runtime.errors import InputError
from edgelora_runtime.tools.layout import ID, MARK, CallLayout
from edgelora_runtime.tools.notations import GemmaNotation, JsonNotation, Notation, PythonNotation, TaggedNotation
from edgelora_runtime.tools.reading import Incomplete, Malformed, read_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgelora_runtime.bundle.messages import Chat

    Render = Callable[[Chat, bool], str]

# Words that stand in no template. Gemma's templates sort parameters, so these are sorted. Mistral's want ids of nine characters.
_NAMES = ("qzfirst", "qzsecond")
_IDS = ("qzidaaaa1", "qzidbbbb2")
_ARGUMENTS = {"qzkeya": "qzvala", "qzkeyb": "qzvalb"}
_TEXT, _THOUGHT = "qztext", "qzthought"
_PARAMETERS = {"type": "object", "properties": {key: {"type": "string"} for key in _ARGUMENTS}}
TRIAL_TOOLS = [{"type": "function", "function": {"name": name, "description": "d", "parameters": _PARAMETERS}} for name in _NAMES]
_USER = {"role": "user", "content": "a"}
_QUOTED = re.compile(r"\{qzkeya:(?P<quote>[^\w\s{}:,]\S*?)qzvala(?P=quote),\s*qzkeyb:(?P=quote)qzvalb(?P=quote)\}")
_KEYWORDS = re.compile(r"\(qzkeya=(['\"])qzvala\1, ?qzkeyb=\1qzvalb\1\)")
_TAGS = re.compile(r"(.*?)qzkeya(.*?)qzvala(.*?)qzkeyb(.*?)qzvalb(.*)", re.DOTALL)
# A call that a prompt shows as an example, such as <tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}.
_DECLARED = re.compile(
    r"""(?P<opening>(?:<[^<>\s]+>|\[[A-Z_]+\])\s*\[?)\{\s*"name"\s*:\s*[^{}\n]*?"(?P<key>arguments|parameters)"\s*:\s*[^\n]*?\}"""
    r"""(?P<closing>\]?\s*(?:<[^<>\s]+>|\[/[A-Z_]+\]))"""
)
_BEFORE_THOUGHT = re.compile(r"(?:<[^<>\s]+>|\[[A-Z_]+\])[A-Za-z]*\s*$")
_AFTER_THOUGHT = re.compile(r"\s*(?:<[^<>\s]+>|\[/[A-Z_]+\])")
_KNOWN_THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>"))

# Template options that say whether to think, or how much, with two values that change a prompt whose template reads them.
THOUGHT_SWITCHES = ("enable_thinking", "thinking")
THOUGHT_LEVEL = "reasoning_effort"
_TRIED = {**dict.fromkeys(THOUGHT_SWITCHES, (False, True)), THOUGHT_LEVEL: ("low", "high")}


@dataclass(frozen=True)
class ThoughtMarks:
    """The marks around a thought, without whitespace, such as `<think>` and `</think>`."""

    opening: str
    closing: str

    def is_open(self, prompt: str) -> bool:
        """True for a prompt that ends with an opened thought, as templates of models that always think write it."""
        return prompt.rstrip().endswith(self.opening)


def find_layout(render: Render) -> CallLayout | None:
    """Finds how a template writes the calls of a message. Returns None for one that leaves calls out, or refuses them.

    render: renders a chat, with or without the start of an answer, and raises InputError where the template refuses it.
    """
    plain = _render_answer(render, {"content": _TEXT})
    if plain is None or _TEXT not in plain:
        return None
    for content in ({}, {"content": ""}, {"content": None}):  # some templates require a content, and some refuse one
        one = _render_answer(render, {**content, "tool_calls": [_make_call(0)]})
        if one is not None and _NAMES[0] in one:
            break
    else:
        return None
    header, _, end = plain.rpartition(_TEXT)
    start = len(_share(header, one))
    at = one.find(_NAMES[0], start)
    if at < 0:
        return None
    opening = one[start:at].lstrip()
    found = _find_arguments(one[at + len(_NAMES[0]) :])
    if found is None:
        return None
    middle, notation, tail = found
    two = _render_answer(render, {**content, "tool_calls": [_make_call(0), _make_call(1)]})
    separator = _find_separator(two, at)
    closing = _find_closing(tail, separator, opening, end)
    layout = CallLayout(
        _mark_ids(opening), _mark_ids(middle), _mark_ids(closing), None if separator is None else _mark_ids(separator), notation
    )
    if "qz" in layout.texts or not (layout.is_object or MARK.match(layout.trigger)):
        return None  # a name that is written twice, or calls that start like a text
    return layout


def _mark_ids(text: str) -> str:
    return re.sub("|".join(_IDS), ID, text)


def find_declared_layout(render: Render) -> CallLayout | None:
    """Finds the call that a template shows the model as an example, where it writes tools but no calls (SmolLM3)."""
    try:
        text = render(check_chat([_USER], {"tools": TRIAL_TOOLS}), True)
    except InputError:
        return None
    found = _DECLARED.search(text)
    if found is None:
        return None
    opening, closing = found["opening"] + '{"name": "', "}" + found["closing"]
    separator = None if opening.rstrip('{"name: ').endswith("[") else f"{closing}\n{opening}"
    return CallLayout(opening, f'", "{found["key"]}": ', closing, separator)


def find_thought_marks(render: Render, source: str) -> ThoughtMarks | None:
    """Finds the marks that a template writes around a message's reasoning_content.

    A template that leaves thoughts out may still name the marks, as that of DeepSeek's distilled models does. source: the
    template's text.
    """
    thinking = _render_answer(render, {"content": _TEXT, "reasoning_content": _THOUGHT}) or ""
    before, found, after = thinking.partition(_THOUGHT)
    if found and (opening := _BEFORE_THOUGHT.search(before)) and (closing := _AFTER_THOUGHT.match(after)):
        marks = ThoughtMarks(opening[0].strip(), closing[0].strip())
        plain = _render_answer(render, {"content": _TEXT}) or ""
        if not plain.partition(_TEXT)[0].rstrip().endswith(marks.opening):  # it starts every message, as in gpt-oss
            return marks
    known = (ThoughtMarks(*marks) for marks in _KNOWN_THOUGHTS if marks[1] in source)
    return next(known, None)


def find_thought_options(render: Render) -> tuple[str, ...]:
    """Finds which of THOUGHT_SWITCHES and THOUGHT_LEVEL a template reads: those that change the prompt."""
    return tuple(name for name, values in _TRIED.items() if len({_render_prompt(render, {name: value}) for value in values}) > 1)


def _render_prompt(render: Render, options: dict[str, Any]) -> str | None:
    try:
        return render(check_chat([_USER], {"template_options": options}), True)
    except InputError:
        return None


def _render_answer(render: Render, answer: dict[str, Any]) -> str | None:
    try:
        return render(check_chat([_USER, {"role": "assistant", **answer}], {"tools": TRIAL_TOOLS}), False)
    except InputError:
        return None


def _make_call(at: int) -> dict[str, Any]:
    return {"id": _IDS[at], "type": "function", "function": {"name": _NAMES[at], "arguments": dict(_ARGUMENTS)}}


def _find_arguments(text: str) -> tuple[str, Notation, str] | None:
    """Finds the arguments in the text after a call's name. Returns the text before them, their notation, and the text after."""
    for brace in (found.start() for found in re.finditer(r"\{", text)):
        try:
            value, end = read_json(text, brace)
        except (Incomplete, Malformed):
            continue
        if value == _ARGUMENTS:
            return text[:brace], JsonNotation(), text[end:]
    if found := _QUOTED.match(text):
        return "", GemmaNotation(found["quote"]), text[found.end() :]
    if found := _KEYWORDS.match(text):
        return "", PythonNotation(), text[found.end() :]
    return _find_tags(text)


def _find_tags(text: str) -> tuple[str, Notation, str] | None:
    found = _TAGS.match(text)
    if found is None or found[2] != found[4]:
        return None
    first, between, joint, _, rest = found.groups()
    shared = _share(first[::-1], joint[::-1])[::-1]
    before = shared[shared.find("<") :] if "<" in shared else ""  # a tag's own text: what stands before it closes another
    after = joint[: len(joint) - len(before)]
    if not before or not after.strip() or not rest.startswith(after):
        return None
    return first[: len(first) - len(before)], TaggedNotation(before, between, after), rest[len(after) :]


def _find_separator(two: str | None, at: int) -> str | None:
    """Returns the text between the first call's arguments and the second call's name, where a template writes both."""
    if two is None or not two.startswith(_NAMES[0], at) or _NAMES[1] not in two:
        return None
    found = _find_arguments(two[at + len(_NAMES[0]) :])
    return None if found is None else found[2].partition(_NAMES[1])[0]


def _find_closing(tail: str, separator: str | None, opening: str, end: str) -> str:
    """Returns the text that closes the calls, without the end of the turn.

    tail: the text after the last arguments. end: the text after a plain answer. Gemma 4 ends a turn with calls by another token
    than one without, so a separator that repeats the opening shows best where a call ends.
    """
    if separator is not None and separator.endswith(opening):
        closing = separator[: len(separator) - len(opening)].rstrip()
        if tail.startswith(closing):
            return closing
    return tail.removesuffix(end).rstrip()


def _share(one: str, other: str) -> str:
    """Returns the longest start that two texts have in common."""
    return one[
        : next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other)))
    ]
