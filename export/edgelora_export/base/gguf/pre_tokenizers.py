"""The ways in which byte-level vocabularies cut a text into words, by the names that GGUF files give them.

Each name and its pattern: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp, `llm_tokenizer_bpe`. Its
comments hold the patterns of the tokenizer.json files that the vocabularies come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_LLAMA3 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = rf"{_CASED % (_ENDINGS + '?', _ENDINGS + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level vocabulary is used.

    pattern: of a word, None for GPT-2's. digits: each is a word of its own, before the pattern. whole_words: a word that is a
    token is taken whole, whatever the merges say. bos: a text starts with the BOS token unless the file says otherwise.
    composed: characters are composed first (NFC).
    """

    pattern: str | None = None
    digits: bool = False
    whole_words: bool = False
    bos: bool = False
    composed: bool = False

    def build(self) -> Any:
        """Builds it with the tokenizers package."""
        from tokenizers import Regex, pre_tokenizers

        if self.pattern is not None:
            split = pre_tokenizers.Split(Regex(self.pattern), behavior="isolated")
            return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]) if self.digits else words


_WHOLE_LLAMA3 = PreTokenizer(_LLAMA3, whole_words=True, bos=True)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "dbrx": PreTokenizer(_LLAMA3),
    "deepseek-r1-qwen": PreTokenizer(_QWEN2),
    "falcon3": _WHOLE_LLAMA3,
    "gpt-2": PreTokenizer(),
    "gpt-4o": PreTokenizer(_GPT4O),
    "llama-bpe": _WHOLE_LLAMA3,
    "llama-v3": _WHOLE_LLAMA3,
    "llama3": _WHOLE_LLAMA3,
    "olmo": PreTokenizer(),
    "qwen2": PreTokenizer(_QWEN2, composed=True),
    "refact": PreTokenizer(digits=True),
    "smaug-bpe": PreTokenizer(_LLAMA3),
    "smollm": PreTokenizer(digits=True),
    "starcoder": PreTokenizer(digits=True),
    "tekken": PreTokenizer(_TEKKEN, whole_words=True),
}
