"""Small tokenizers of the kinds that models have, and texts of every script to try them on. All are made on the spot."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TRAINING_TEXT = (
    "the cat sat on the mat",
    "a day in the sun, and the moon",
    "one two three four",
    "Größe → naïve café 日本語 🙂",
    "question: how many? answer: nine.",
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_TOKENS = 320
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def save_byte_level(folder: Path) -> None:
    """GPT-2's kind: bytes as characters, and no token of beginning."""
    _save(folder, _train_byte_level(), {"bos_token": "<s>", "eos_token": "</s>"})


def save_metaspace(folder: Path) -> None:
    """Gemma's kind: a mark in place of spaces, bytes for unknown characters, a token of beginning."""
    tokenizer = _train_metaspace()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = _begin(tokenizer)
    _save(folder, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"})


def save_llama(folder: Path) -> None:
    """Llama 2's kind: the file writes a space before every piece, and its class makes a pipeline of its own in place of that."""
    tokenizer = _train_metaspace()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer.post_processor = _begin(tokenizer)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _save(folder, tokenizer, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **roles})


def save_split_tokens(folder: Path) -> None:
    """Phi 3's and Qwen's kind: added tokens that take the spaces beside them, that are whole words, or that stand elsewhere."""
    tokenizer = _train_byte_level()
    tokenizer.add_tokens(
        [AddedToken("    ", normalized=True), AddedToken("word", single_word=True), AddedToken("<tool>", rstrip=True)]
    )
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True), AddedToken("<|assistant|>", lstrip=True, rstrip=True)])
    _save(folder, tokenizer, {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<|end|>"})  # <|end|> stands only here
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


KINDS: dict[str, Callable[[Path], None]] = {
    "byte-level": save_byte_level,
    "metaspace": save_metaspace,
    "llama": save_llama,
    "split tokens": save_split_tokens,
}

_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "àéîõüçñßøåæœłžğİıſ",
    "абвгдеёжзИЙКЛМН",
    "αβγδεζηθΛΜΝΞ",
    "אבגדהוזحطيكلمنهوپچ٠١٢",
    "अआइकखगघि़्बাংলাதமிழ்ไทยภาษា",
    "的一是不了人我在有他这中日本語ひらがなカタカナ한국어",
    "0123456789.,+-*/=%$€½²Ⅷ",
    "🙂👍🏽👩‍👩‍👧🇩🇪❤️🏳️‍🌈😀",
    " \t\n\r\u00a0\u3000\u200b",
    "(){}[]<>\"'`~!@#^&|\\;:?_…—“”«»",
    "e\u0301a\u0308n\u0303\u00ad\ufeff\ufffd\U00020bb7",
)
_SPACES = ("", "", " ", " ", "  ", "     ", "\n", "\n\n", "\t", " \n ")
_SPECIAL = ("<s>", "</s>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>", "<|endoftext|>", "<tool>", "word", "▁", "Ġ", "<0x41>")


def make_texts(count: int, seed: int = 0) -> Iterator[str]:
    """Texts of all scripts with emoji, runs of white space, and special tokens inside."""
    draw = random.Random(seed)
    for _ in range(count):
        pieces = []
        for _ in range(draw.randrange(1, 12)):
            letters = draw.choice(_ALPHABETS)
            word = "".join(draw.choice(letters) for _ in range(draw.randrange(1, 9)))
            pieces += [draw.choice(_SPACES), draw.choice(_SPECIAL) if draw.random() < 0.25 else word]
        yield "".join(pieces)


def _save(folder: Path, tokenizer: Any, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _train_byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_TOKENS, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT * 4, trainer)
    return tokenizer


@cache
def _learn_merges() -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges over text with a mark in place of spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.train_from_iterator(TRAINING_TEXT * 4, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


def _train_metaspace() -> Any:
    pieces, merges = _learn_merges()
    vocabulary = {piece: place for place, piece in enumerate(["<unk>", "<s>", "</s>", *_BYTES, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def _begin(tokenizer: Any) -> Any:
    return processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
