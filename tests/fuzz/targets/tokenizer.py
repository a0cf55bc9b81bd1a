"""A bundle's tokenizer.json and tokenizer_config.json, used on a few texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelora_runtime import Bundle
from edgelora_runtime.bundle.shortest_encoding import LongestToken
from edgelora_runtime.bundle.tokenizer import TOKENIZER, TOKENIZER_CONFIG, IncrementalDecoder, Tokenizer, load_tokenizer
from tests.attacks.texts import sequence, split, template_of
from tests.fuzz.harness import Harness, join_parts, split_parts
from tests.fuzz.mutations import mutate_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from random import Random

TEXTS = ("", "the cat sat on the mat", "a" * 200, " \t\n ", "héllo ﷺ \U0001f600 <s></s>", "1234567890" * 4, "))))((((")
NORMALIZERS: list[dict[str, Any]] = [
    *({"type": kind} for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel")),
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
]
SPLITTERS: list[dict[str, Any]] = [
    *({"type": kind} for kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts")),
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Digits", "individual_digits": True},
    {"type": "Punctuation", "behavior": "Removed"},
    {"type": "CharDelimiterSplit", "delimiter": "a"},
    {"type": "FixedLength", "length": 5},
    split(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    split("(a+)+$"),
    split(r"(?:a|ab)+?\b{2,}"),
]
DECODERS: list[dict[str, Any]] = [
    *({"type": kind} for kind in ("ByteFallback", "Fuse")),
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "BPEDecoder", "suffix": "</w>"},
    {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
]
MODELS: list[dict[str, Any]] = [
    {
        "type": "WordPiece",
        "unk_token": "a",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {"a": 0, "the": 1},
    },
    {"type": "WordLevel", "vocab": {"a": 0, "the": 1}, "unk_token": "a"},
    {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["the", -1.0], ["▁", -2.0]], "byte_fallback": False},
]
ADDED = {"id": 7, "content": "the", "single_word": False, "lstrip": True, "rstrip": True, "normalized": True, "special": True}
PADDING = {
    "strategy": {"Fixed": 99999},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "a",
}
CUTTING = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
WORDS = (
    *(*NORMALIZERS, *SPLITTERS, *DECODERS, *MODELS, ADDED, PADDING, CUTTING, template_of(2), template_of(200)),
    *(sequence("normalizers", NORMALIZERS[:3]), sequence("pretokenizers", SPLITTERS[3:6]), sequence("decoders", DECODERS[:4])),
    *("byte_fallback", "fuse_unk", "ignore_merges", "dropout", "unk_token", "bos_token", "extra_special_tokens", "<s>", "</s>"),
    *(
        "(a*)*",
        "(?:a{1,})+",
        "(?<=a+)b",
        "(?=a)*",
        "[^\\S",
        "\\p{L}+",
        "\\G",
        "(?>a+)",
        "(?~a)",
        "\\k<1>",
        "(?<1>a)\\g<1>",
        "(a|a)*$",
        "a{9999}",
    ),
)


@dataclass(frozen=True, repr=False)
class Held(Bundle):
    """A bundle whose texts are in memory."""

    texts: Mapping[str, bytes]

    def read(self, name: str, *, limit: int = 0) -> bytes:
        return self.texts[name]

    def has(self, name: str) -> bool:
        return name in self.texts


def build(bundle: Path, folder: Path) -> Harness:
    opened = Bundle.open(bundle)
    good, config = opened.read(TOKENIZER), opened.read(TOKENIZER_CONFIG)

    def use(raw: bytes) -> None:
        text, settings = split_parts(raw, 2)
        tokenizer = Tokenizer(Held(opened.folder, opened.manifest, {TOKENIZER: text, TOKENIZER_CONFIG: settings or b"{}"}))
        longest = LongestToken(load_tokenizer(text))
        for each in TEXTS:
            ids = tokenizer.encode(each, special_tokens=False)
            assert longest.count_at_least(each) <= len(ids), (
                f"{each[:20]!r} has {len(ids)} tokens, not {longest.count_at_least(each)}"
            )
            tokenizer.encode_prompt(each)
            tokenizer.decode(ids)
            decoder = IncrementalDecoder(tokenizer)
            for token in ids[:20]:
                decoder.push(token)
                tokenizer.name_token(token)
            decoder.flush()
        _ = tokenizer.size, tokenizer.added_tokens, tokenizer.special_tokens

    return Harness(list_seeds(good, config), mutate, use)


def list_seeds(good: bytes, config: bytes) -> list[bytes]:
    """The golden tokenizer, and ones of every kind of part."""
    value = json.loads(good)
    changed = [
        *({**value, "normalizer": part} for part in NORMALIZERS),
        *({**value, "pre_tokenizer": part} for part in SPLITTERS),
        *({**value, "decoder": part} for part in DECODERS),
        *({**value, "model": model, "decoder": None} for model in MODELS),
        {**value, "post_processor": template_of(2), "added_tokens": [*value["added_tokens"], ADDED]},
    ]
    return [join_parts(good, config), *(join_parts(json.dumps(each).encode(), config) for each in changed)]


def mutate(raw: bytes, chance: Random) -> bytes:
    text, config = split_parts(raw, 2)
    if chance.randrange(8):
        return join_parts(mutate_json(text, chance, WORDS), config)
    return join_parts(text, mutate_json(config, chance, WORDS))
