"""BPE models whose continuing pieces have a prefix: they load if their merges have it, and never reach the library if not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from edgelora_export.base.tokenizer import read_tokenizer
from edgelora_runtime.bundle.tokenizer import TOKENIZER, load_tokenizer
from edgelora_runtime.bundle.tokenizer_parts import check_merges
from edgelora_runtime.errors import InputError, IntegrityError

VOCAB = {"é": 0, "##é": 1, "##e": 2, "éé": 3, "éée": 4, "h": 5}


def pack(merges: list[Any], prefix: str | None = "##", key: str = "continuing_subword_prefix") -> bytes:
    model = {"type": "BPE", "vocab": VOCAB, "merges": merges, key: prefix}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model}).encode()


@pytest.mark.parametrize("merges", [[["é", "##é"], ["éé", "##e"]], ["é ##é", "éé ##e"]], ids=["pairs", "text"])
def test_merges_with_their_prefix_load(merges: list[Any]) -> None:
    raw = pack(merges)
    assert load_tokenizer(raw).encode("ééeh").ids == Tokenizer.from_str(raw.decode()).encode("ééeh").ids


@pytest.mark.parametrize("prefix", [None, ""])
def test_merges_without_a_prefix_load(prefix: str | None) -> None:
    assert load_tokenizer(pack([["é", "é"]], prefix)).encode("éé").tokens == ["éé"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("prefix", [None, ""])
def test_files_without_a_prefix_are_not_parsed(prefix: str | None, indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.dumps(json.loads(pack([["é", "é"]], prefix)), indent=indent).encode()
    monkeypatch.setattr("edgelora_runtime.bundle.tokenizer_parts.json.loads", None)
    check_merges(raw, TOKENIZER)


@pytest.mark.parametrize(
    "raw",
    [
        pack([["é", "##é"], ["é", "é"]], "a"),
        pack(["é é"], "a"),
        pack([["é", "é"]], "a").replace(b"continuing", rb"continuin\u0067"),
        pack([["é", "é"]], "a").replace(b'"merges"', b'"merges": [], "merges"'),
        pack([5], "a"),
        pack([{}], "a"),
        pack([["é", "é"]], "a").replace(b'"1.0"', b"1" * 5000),
    ],
    ids=["pairs", "text", "escaped key", "repeated key", "no pairs", "an object", "a number too long for Python"],
)
def test_merges_without_their_prefix_are_refused(raw: bytes) -> None:
    """The library ends the process for some of them."""
    with pytest.raises(IntegrityError, match=r"tokenizer\.json (has merges of continuing pieces|is not valid JSON)"):
        load_tokenizer(raw)
    with pytest.raises(InputError, match=r"base b: tokenizer\.json (has merges of continuing pieces|is not valid JSON)"):
        read_tokenizer({TOKENIZER: raw}, "base b")
