"""The paths through a pattern are counted from its form: never too few, and never for a pattern of exponential time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora_export.base.gguf.pre_tokenizers import PRE_TOKENIZERS
from edgelora_runtime.backtracking import PatternError, bound_paths, count_paths

COUNTED = {
    "abc": {0: 1},
    "a?b??": {0: 4},
    "a*b+c": {2: 1},
    "(a|b|c)d": {0: 3},
    "(a|b*)(c|d)": {0: 2, 1: 2},
    "a{2,5}": {0: 4},
    "a{,3}": {0: 4},
    "a{2,}": {1: 1},
    "(a|b){3}": {0: 24},
    "[)(*+]": {0: 1},
    "[^]*]x": {0: 1},
    r"[\]*]\)\*": {0: 1},
    r"\p{L}+": {1: 1},
    "[[:alpha:]*]+": {1: 1},
    r"(?i:'s|'t)?\p{N}{1,3}": {0: 9},
    "(?!a*)b": {1: 1},
}
REFUSED = {
    "(a+)+": "exponential",
    "(?:a*|b)*": "exponential",
    "(?:a{1,}){1,}": "exponential",
    "((a+)b){2}": "exponential",
    "a**": "exponential",
    r"(a+|\\)+": "exponential",  # the backslash is escaped, so that the bracket closes
    "(?x:(a+) +)": "starts with",
    "(?(1)a|b)": "starts with",
    r"(a)\1": "refers back",
    r"\g<1>": "refers back",
    r"(a+\c))+": "escape",
    "a{5000}": "4096",
    "(" * 50 + ")" * 50: "deeper",
}


@pytest.mark.parametrize(("pattern", "paths"), COUNTED.items(), ids=COUNTED)
def test_paths_are_counted(pattern: str, paths: dict[int, int]) -> None:
    assert dict(count_paths(pattern)) == paths


@pytest.mark.parametrize(("pattern", "said"), REFUSED.items(), ids=REFUSED)
def test_patterns_without_a_bound_are_refused(pattern: str, said: str) -> None:
    with pytest.raises(PatternError, match=said):
        count_paths(pattern)


@pytest.mark.parametrize("pattern", ["(a|b)*", "(a){2}", "(?i:a)", "(?=a)", "(?<n>a)"])
def test_plain_patterns_have_groups_alone(pattern: str) -> None:
    count_paths(pattern)
    with pytest.raises(PatternError):
        count_paths(pattern, plain=True)


@pytest.mark.parametrize("name", [name for name, each in PRE_TOKENIZERS.items() if each.pattern])
def test_published_patterns_have_few_paths(name: str) -> None:
    paths = count_paths(PRE_TOKENIZERS[name].pattern or "")
    assert max(paths) <= 2
    assert paths.total() <= 40


def test_repetitions_share_a_text() -> None:
    assert bound_paths(count_paths("a*b*"), 3) == 10  # of a and b, and of what is left: 3 + 2 choose 2
    assert bound_paths(count_paths("(a|b)c"), 100) == 2


def count_ends(pattern: str, text: str) -> int:
    """The places where a match that starts a text can end, each of which is a path of its own."""
    return sum(re.match(f"(?:{pattern})\\Z", text[:end]) is not None for end in range(len(text) + 1))


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@given(st.text(alphabet="ab*+?(|)[]{2,}\\\\", max_size=10))
def test_there_are_never_fewer_paths_than_ends_of_a_match(pattern: str) -> None:
    text = "abab"
    try:
        re.compile(pattern)
        paths = count_paths(pattern, plain=True)
    except (re.error, PatternError):
        return
    assert bound_paths(paths, len(text)) >= count_ends(pattern, text)
