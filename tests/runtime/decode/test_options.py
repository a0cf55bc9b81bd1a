"""The declaration of a request's options: defaults, checks, and every mistake in one error."""

from __future__ import annotations

from typing import Any

import pytest

from edgelora_runtime import Runtime, UsageError
from edgelora_runtime.decode.options import OPTIONS, TYPES, resolve_options


def test_options_left_out_get_their_defaults() -> None:
    resolved = resolve_options({"top_k": 3})
    assert resolved.keys() == OPTIONS.keys()
    assert resolved["top_k"] == 3
    assert resolved["max_tokens"] == OPTIONS["max_tokens"].default


def test_declarations_are_complete_and_accept_their_own_defaults() -> None:
    assert TYPES.keys() == OPTIONS.keys()
    for name, option in OPTIONS.items():
        assert option.help.endswith("."), name
        assert option.accepts(option.default), name
        assert not option.choices or option.default in option.choices, name


WRONG: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", 3.5),
    ("max_tokens", "3"),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", "hot"),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", float("nan")),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", float("inf")),
    ("seed", -1),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [1]),
    ("stop", None),
    ("timeout", 0),
    ("timeout", -1.0),
    ("timeout", float("nan")),
    ("logprobs", -1),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_refused_with_what_to_use(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} = .*: use ") as refused:
        resolve_options({name: value})
    assert OPTIONS[name].allowed in str(refused.value)


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.choices])
def test_a_choice_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name} 'wrap' is not supported; use one of {', '.join(OPTIONS[name].choices)}$"):
        resolve_options({name: "wrap"})


def test_all_mistakes_are_named_at_once() -> None:
    values = {"temprature": 1, "temperature": -1, "top_k": -1, "overflow": "wrap"}
    conflicts = {"regex": "a", "grammar": "b", "ignore_eos": True}
    with pytest.raises(UsageError) as refused:
        resolve_options(values | conflicts)
    parts = ("'temprature'", "temperature = -1", "top_k = -1", "overflow 'wrap'", "regex and grammar are given", "ignore_eos")
    assert [part for part in parts if part not in str(refused.value)] == []


def test_an_unknown_option_is_refused_with_the_nearest_name(runtime: Runtime) -> None:
    misspelt: Any = {"max_token": 3}
    with pytest.raises(UsageError, match="no option 'max_token'; did you mean 'max_tokens'"):
        runtime.stream("a", **misspelt)
    with pytest.raises(UsageError, match="no option 'q'; use one of variant, mix"):
        resolve_options({"q": 3})
