"""Streams show neither stop strings nor parts of characters, and lose no text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgelora_runtime.bundle.tokenizer import IncrementalDecoder, Tokenizer
from edgelora_runtime.decode.stop_strings import StopFilter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# --- stop strings ---------------------------------------------------------------------------------------------------------

LETTERS = st.text("ab\n", max_size=12)


def cut(text: str, stop: Sequence[str]) -> str:
    """Reference: the text up to the stop string that completes first, character by character.

    A stream knows only what it has read: the stop string that ends first decides, and of several that end there, the one that
    began first.
    """
    for end in range(1, len(text) + 1):
        starts = [text[:end].find(word) for word in stop if text[:end].find(word) >= 0]
        if starts:
            return text[: min(starts)]
    return text


@given(st.lists(LETTERS, max_size=8), st.text("ab\n", min_size=1, max_size=6))
@settings(max_examples=500)
@example(["aa", "b"], "aab")
@example(["a", "a", "a", "b"], "aab")
@example(["ab", "a", "b", "a", "ab"], "ababab")
def test_output_is_the_text_up_to_the_stop_string(pieces: list[str], word: str) -> None:
    text = "".join(pieces)
    filter_ = StopFilter([word])
    shown = [filter_.push(piece) for piece in pieces]
    shown.append(filter_.flush())
    at = text.find(word)
    assert "".join(shown) == (text if at < 0 else text[:at])
    assert filter_.stopped == (at >= 0)


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3))
@settings(max_examples=300)
def test_several_stop_strings_character_by_character(text: str, stop: list[str]) -> None:
    filter_ = StopFilter(stop)
    assert "".join([*map(filter_.push, text), filter_.flush()]) == cut(text, stop)


@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=6), max_size=3))
def test_nothing_is_held_back_that_cannot_become_a_stop_string(pieces: list[str], stop: list[str]) -> None:
    """After each piece, the text that is not shown yet is the prefix of a stop string."""
    filter_, shown, read = StopFilter(stop), "", ""
    for piece in pieces:
        shown += filter_.push(piece)
        read += piece
        if filter_.stopped:
            assert not any(word in shown for word in stop)
            return
        held = read[len(shown) :]
        assert read.startswith(shown)
        assert not held or any(word.startswith(held) and word != held for word in stop)


def test_no_text_after_the_stop_string() -> None:
    filter_ = StopFilter(["END"])
    assert filter_.push("fine EN") == "fine "
    assert filter_.push("D and more") == ""
    assert filter_.push("even more") == ""
    assert filter_.flush() == ""


def test_a_single_string_is_one_stop_string() -> None:
    filter_ = StopFilter("ab")
    assert filter_.push("xaab") == "xa"


# --- characters -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pocket", "gpt2", "phi3"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """A real tokenizer; only decode() and encode() matter, so a folder stands for the bundle."""
    kind = "models" if request.param == "pocket" else "tokenizers"
    folder: Path = request.getfixturevalue(f"{kind}_folder") / request.param
    bundle = SimpleNamespace(
        read=lambda name, limit=0: (folder / name).read_bytes(),
        has=lambda name: name in ("tokenizer.json", "tokenizer_config.json"),
        manifest=SimpleNamespace(files={}),
    )
    return Tokenizer(cast("Any", bundle))


def stream(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(token) for token in ids]
    for piece in pieces:
        assert not piece.endswith("\ufffd"), "a piece ends in the middle of a character"
    return [*pieces, decoder.flush()]


TEXTS = [
    "plain text, with punctuation.",
    " leading and trailing spaces  ",
    "  two   three    four",
    "line\nbreaks\r\n\n\ttabs",
    "naïve café Größe Ærø",
    "日本語のテキスト、中文字符，한국어 텍스트",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪",
    "e\u0301 a\u0308 o\u0302\u0323 combining",
    "\u0938\u094d\u0924\u0947 नमस्ते العربية עברית",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0001f600\U0010fffd",
    "mixed 日 a 🙂 b é\u0301",
    "\u200b\u200d\ufe0f invisible",
]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
    assert text.strip() in tokenizer.decode(ids)


def test_text_is_shown_as_soon_as_it_is_complete(tokenizer: Tokenizer) -> None:
    """Words are not held back: each is shown at most one token after its last."""
    ids = tokenizer.encode("one two three four five six")
    decoder, shown = IncrementalDecoder(tokenizer), ""
    for count, token in enumerate(ids, start=1):
        shown += decoder.push(token)
        assert shown.strip() == tokenizer.decode(ids[:count]).strip()


@given(text=st.text(max_size=40))
@settings(deadline=None, max_examples=150)
def test_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def single_bytes(tokenizer: Tokenizer) -> list[int]:
    """The 256 tokens of single bytes in a byte-fallback vocabulary, in the order of the bytes."""
    rust = tokenizer._tokenizer
    if has_byte_fallback(tokenizer):
        return [cast("int", rust.token_to_id(f"<0x{byte:02X}>")) for byte in range(256)]
    return [token for text, token in rust.get_vocab(with_added_tokens=False).items() if len(text) == 1]


def has_byte_fallback(tokenizer: Tokenizer) -> bool:
    return tokenizer._tokenizer.token_to_id("<0x00>") is not None


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_any_tokens(tokenizer: Tokenizer, single_bytes: list[int], data: st.DataObject) -> None:
    """Random ids, as a sampling model at high temperature writes them.

    One case is skipped. Once one byte token is invalid, a byte-fallback decoder turns the whole run of byte tokens into U+FFFD,
    also complete characters before it. A stream has shown these by then, rightly.
    """
    vocabulary = tokenizer._tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, vocabulary - 1), max_size=30))
    if has_byte_fallback(tokenizer):
        ids = [token for token in ids if token not in single_bytes]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_any_bytes(tokenizer: Tokenizer, single_bytes: list[int], data: st.DataObject) -> None:
    """Byte by byte: parts of characters wait, and invalid bytes become U+FFFD."""
    assert len(single_bytes) == 256
    if has_byte_fallback(tokenizer):
        tokens = [single_bytes[byte] for byte in data.draw(st.text(max_size=12)).encode()]
    else:
        tokens = data.draw(st.lists(st.sampled_from(single_bytes), max_size=30))
    assert "".join(stream(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_an_unfinished_character_at_the_end_is_not_lost(tokenizer: Tokenizer) -> None:
    for text in ("x 🙂", "x 日"):
        ids = tokenizer.encode(text)
        for count in range(1, len(ids) + 1):
            assert "".join(stream(tokenizer, ids[:count])) == tokenizer.decode(ids[:count])
