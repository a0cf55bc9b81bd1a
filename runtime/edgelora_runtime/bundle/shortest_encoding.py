"""A bound on the tokens of a text, from below, so that a text that cannot fit is refused before it is tokenized."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

# Parts of a tokenizer that drop no character but, where said, white space. With any other, nothing is known.
_KEEPING = {"ByteLevel", "Metaspace", "Digits", "Punctuation", "Split", "Sequence", "Prepend", "Replace", "NFC", "UnicodeScripts"}
_DROPPING_SPACE = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Strip"}
_COMPOSED = 3  # NFC makes at most so many bytes into one: a Hangul syllable of three letters


class LongestToken:
    """The longest text that one token of a tokenizer can stand for.

    size: in bytes of UTF-8, or None where a token can stand for a text of any length: one of unknown characters, or of characters
    that the tokenizer drops. drops_space: size counts no white space, which the tokenizer may drop.
    """

    def __init__(self, tokenizer: RustTokenizer) -> None:
        kinds = _list_kinds(tokenizer.normalizer) | _list_kinds(tokenizer.pre_tokenizer)
        added = tokenizer.get_added_tokens_decoder().values()
        self.drops_space = bool(kinds & _DROPPING_SPACE) or any(token.lstrip or token.rstrip for token in added)
        self.size: int | None = None
        vocabulary = tokenizer.get_vocab()
        if kinds <= _KEEPING | _DROPPING_SPACE and _reads_all(tokenizer, kinds, vocabulary):
            longest = max((len(token.encode(errors="replace")) for token in vocabulary), default=1)
            self.size = longest * (_COMPOSED if "NFC" in kinds else 1)

    def count_at_least(self, text: str) -> int:
        """Returns a number of tokens that the text has in any case."""
        if self.size is None:
            return 0
        kept = "".join(text.split()) if self.drops_space else text
        return -(-len(kept.encode(errors="replace")) // self.size)


def _list_kinds(part: Any) -> set[str]:
    """Returns the kinds of a tokenizer's part and of the parts in it. "unknown" is among them if one may drop characters."""
    if part is None:
        return set()
    found: set[str] = set()
    unread = [json.loads(part.__getstate__())]
    while unread:
        entry = unread.pop()
        found.add(entry["type"])
        unread += [*entry.get("pretokenizers", ()), *entry.get("normalizers", ())]
        is_shortening = entry["type"] == "Replace" and (
            "Regex" in entry["pattern"] or len(entry["content"].encode()) < len(entry["pattern"].get("String", "").encode())
        )
        if is_shortening or entry.get("behavior") == "Removed":
            found.add("unknown")
    return found


def _reads_all(tokenizer: RustTokenizer, kinds: set[str], vocabulary: dict[str, int]) -> bool:
    """True if every byte has a token, so that no unknown character is dropped or joined with its neighbours."""
    model: Any = tokenizer.model
    if type(model).__name__ == "BPE":
        if "ByteLevel" in kinds:
            from tokenizers.pre_tokenizers import ByteLevel

            return all(letter in vocabulary for letter in ByteLevel.alphabet())
        if model.byte_fallback:
            return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return False
