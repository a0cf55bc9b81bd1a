"""Messages of errors: one printable line of bounded length, whatever text of a stranger they quote."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora_runtime.errors import (
    LONGEST_MESSAGE,
    EdgeloraError,
    InputError,
    IntegrityError,
    MissingExtraError,
    ResourceError,
    UsageError,
    make_printable,
    suggest_name,
)

ERRORS = (EdgeloraError, UsageError, InputError, IntegrityError, ResourceError)
CASES = {
    "a color": ("\x1b[31mred", "\\x1b[31mred"),
    "a title of the window": ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
    "C1, which some terminals obey": ("\x9b31m", "\\x9b31m"),
    "a second line": ("first\nedgelora: all is well", "first edgelora: all is well"),
    "Windows' line end": ("first\r\n  second", "first second"),
    "a line over the line": ("bad\rgood", "bad good"),
    "tabs": ("a\tb", "a b"),
    "writing from the right": ("abc\u202egnp.exe", "abc\\u202egnp.exe"),
    "no width": ("pay\u200bpal", "pay\\u200bpal"),
    "a name that is no UTF-8": ("caf\udce9", "caf\\udce9"),
    "two spaces of a path": ("my  models/Größe 日本語 🙂", "my  models/Größe 日本語 🙂"),
}


@pytest.mark.parametrize(("text", "expected"), CASES.values(), ids=CASES.keys())
def test_what_a_terminal_obeys_is_escaped(text: str, expected: str) -> None:
    assert make_printable(text) == expected


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_is_made_printable(kind: type[EdgeloraError]) -> None:
    error = kind(f"{CASES['a color'][0]} and {'x' * 10_000} in a\nfile; choose another file")
    said = str(error)
    assert said.startswith("\\x1b[31mred and xxx")
    assert said.endswith("in a file; choose another file"), "what to do is at the end, and stays"
    assert len(said) <= LONGEST_MESSAGE + 10
    assert error.args == (said,)


def test_an_error_crosses_processes() -> None:
    for error in (InputError("a\x1bb"), ResourceError("no space"), MissingExtraError("\x1bpeft", "train")):
        sent = pickle.loads(pickle.dumps(error))
        assert (type(sent), sent.args) == (type(error), error.args)


@given(st.text(), st.integers(1, 300))
def test_any_text_becomes_one_printable_line(text: str, limit: int) -> None:
    made = make_printable(text, limit)
    assert made.isprintable()
    made.encode()  # no lone surrogate
    assert make_printable(made, 10 * limit + 100) == made, "a second time changes nothing"
    assert len(made) <= 10 * (limit + 1), "an escape takes ten characters at most"


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=200))
def test_printable_text_stays(text: str) -> None:
    assert make_printable(text) == text


def test_the_nearest_name_is_offered() -> None:
    known = ("sql", "medical", "clinic")
    assert suggest_name(["medcal"], known) == "; did you mean 'medical'?"
    assert suggest_name(["sqll", "clinik"], known) == "; did you mean 'sql' and 'clinic'?"
    assert suggest_name(["weather"], known) == ""
    assert suggest_name([], known) == suggest_name(["sql"], []) == ""
    assert suggest_name(["m" * 10_000_000], known) == "", "at once"
