"""Checks on probe texts that a packed tokenizer makes the tokens of transformers."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from edgelora_export.base.quiet import quiet_libraries
from edgelora_export.texts.trial import try_patterns
from edgelora_runtime.bundle.tokenizer import TOKENIZER, load_tokenizer
from edgelora_runtime.errors import InputError, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PROBES = (
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    " leading space",
    "trailing spaces   ",
    "two  three   four    and\ttabs\t\tand\n\n\nlines\r\n  indented\n        deeper",
    "1234567890 3.14159 1,000,000 ½ Ⅳ ٣٤٥",
    "don't, I'LL, we've — “quoted”… (a) [b] {c} <d>",
    "Größe Zürich Ærø naïve café e\u0301 Ångström ﬁn",
    "Привет, мир! Ελληνικά, Հայերեն, ქართული",
    "שלום עולם مرحبا بالعالم فارسی",
    "नमस्ते दुनिया বাংলা தமிழ் తెలుగు ไทย ភាសាខ្មែរ မြန်မာ",
    "你好，世界。日本語のテキスト 한국어 텍스트 𠮷野家",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️ 👍🏽",
    "zero\u200bwidth\u00a0no-break\u3000wide\ufeffmark",
    "def f(x: int) -> str:\n    return f'{x!r}'  # a\n\tif (a >= b && c != d) { s += \"\\n\"; }",
    "https://example.org/a?b=c&d=%20 user@example.org C:\\temp\\x",
    "<s>[INST] x [/INST]</s> <|im_start|>user\nx<|im_end|>\n <bos><eos> <unk>▁a▁ ĠaĊ",
)
_ADDED = 64  # added tokens that are probed; some tokenizers have thousands of placeholders


def check_tokenizer(tokenizer: Any, files: Mapping[str, bytes], owner: str) -> None:
    """Encodes probe texts on both sides: scripts, emoji, white space, digits, code, and the tokenizer's added tokens.

    files: as pack_tokenizer packs them. Raises IntegrityError with the first text whose tokens differ, and InputError for a
    tokenizer whose regular expressions take long.
    """
    if getattr(tokenizer, "split_special_tokens", False):
        raise InputError(
            f"the tokenizer of {owner} has split_special_tokens, by which special tokens in a text are plain text, and a bundle "
            "cannot do that; set it to false in tokenizer_config.json"
        )
    packed = load_tokenizer(files[TOKENIZER])
    try_patterns(files[TOKENIZER], owner)
    with quiet_libraries(whole_process=False):  # transformers warns of long texts
        for text in (*PROBES, *_probe_added_tokens(tokenizer)):
            theirs, ours = list(tokenizer(text)["input_ids"]), list(packed.encode(text).ids)
            if theirs != ours:
                raise IntegrityError(
                    f"the tokenizer of {owner} does not survive export: {text!r} has tokens {_shorten(theirs)} in transformers "
                    f"and {_shorten(ours)} in the bundle; save it again with this transformers, or report this"
                )


def _probe_added_tokens(tokenizer: Any) -> Iterator[str]:
    """Yields texts with added tokens inside, among them every special token that has a role."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    named = [str(token) for token in tokenizer.all_special_tokens]
    for token in dict.fromkeys((*named, *islice(added, _ADDED))):
        yield f"{token}one {token} two{token}{token}\n{token}"


def _shorten(ids: list[int], most: int = 12) -> str:
    return f"{ids[:most]}{' …' if len(ids) > most else ''}"
