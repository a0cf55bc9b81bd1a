"""A tokenizer whose expressions take long is found before it enters a bundle, in a process that is given a few seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgelora_export.base.gguf.pre_tokenizers import PRE_TOKENIZERS
from edgelora_export.texts.trial import list_texts, main, try_patterns
from edgelora_runtime.errors import InputError

GOLDEN = Path(__file__).resolve().parents[2] / "runtime" / "bundle" / "golden" / "bundle" / "tokenizer.json"


def pack(pattern: str | None) -> bytes:
    """The golden tokenizer, which cuts words by a pattern."""
    value: dict[str, Any] = json.loads(GOLDEN.read_bytes())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return json.dumps(value if pattern is None else {**value, "pre_tokenizer": split}).encode()


def test_a_published_pattern_is_quick() -> None:
    try_patterns(pack(PRE_TOKENIZERS["gpt-4o"].pattern), "the base")


def test_a_pattern_that_goes_back_for_every_character_is_refused() -> None:
    with pytest.raises(InputError, match=r"the tokenizer of the base takes more than .* of 'a', or fails there"):
        try_patterns(pack("(?:a|a)*$"), "the base")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["a+a+b", "x+x+y", "[ab]+[bc]+d"])
def test_a_pattern_of_cubic_time_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="takes more than"):
        try_patterns(pack(pattern), "the base")


def test_a_tokenizer_without_expressions_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", main)  # which would read the tests' own input
    try_patterns(pack(None), "the base")


def test_texts_repeat_what_the_pattern_names() -> None:
    texts = list_texts(["q+z?"])
    assert {"'q'", "'z'", "'a'", "' '"} <= texts.keys()
    assert len(set(map(len, texts.values()))) == 1
