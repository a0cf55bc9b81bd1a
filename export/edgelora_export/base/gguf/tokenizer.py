"""Makes a tokenizer.json from the vocabulary of a GGUF file: byte-level BPE, or SentencePiece's BPE with scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.base.gguf.pre_tokenizers import PRE_TOKENIZERS
from edgelora_export.base.gguf.values import Values
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # types of tokens; 1 is a normal one
_SPACE = "\u2581"  # SentencePiece's sign for a space
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Special tokens that leave the spaces after them alone, as in Phi-3's own tokenizer.json. llama.cpp differs in the last three.
# https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/blob/main/tokenizer.json
_PHI3_KEEPING_SPACE = ("<s>", "<unk>", "<|endoftext|>", "<|system|>", "<|user|>", "<|end|>")


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a file.

    values: the metadata under tokenizer.ggml. model: `gpt2` or `llama`, as GGUF calls byte-level BPE and SentencePiece's. tokens:
    by id. kinds: the type of each. phi3: True for Phi-3, whose special tokens take the spaces after them.
    """

    values: Values
    model: str
    tokens: list[str]
    kinds: NDArray[Any]
    phi3: bool

    @classmethod
    def read(cls, path: Path, metadata: Mapping[str, Any]) -> Vocabulary:
        """Reads the vocabulary. Raises InputError for other kinds, and for lists that do not fit each other."""
        values = Values(path, metadata, "tokenizer.ggml.")
        if (model := values.text("model")) not in ("gpt2", "llama"):
            raise values.fail("model", f"is {model!r}; supported: gpt2 (byte-level BPE) and llama (SentencePiece BPE)")
        tokens = values.texts("tokens")
        if len(set(tokens)) < len(tokens):
            raise values.fail("tokens", "has a token twice")
        kinds = values.numbers("token_type", len(tokens)) if "token_type" in values else np.ones(len(tokens), np.int32)
        return cls(values, model, tokens, kinds, metadata.get("general.architecture") == "phi3")

    def special_token(self, key: str) -> str | None:
        """Returns the text of a token that the metadata name by id, such as `bos`, None if they name none."""
        if f"{key}_token_id" not in self.values:
            return None
        index = self.values.integer(f"{key}_token_id", least=0)
        if index >= len(self.tokens):
            raise self.values.fail(f"{key}_token_id", f"is {index}, but the vocabulary has {len(self.tokens)} tokens")
        return self.tokens[index]

    def ids(self) -> dict[str, int]:
        """Returns the id of each token that a text can have. Rows that only fill the matrix up have none."""
        return {
            token: index
            for index, (token, kind) in enumerate(zip(self.tokens, self.kinds.tolist(), strict=True))
            if kind != _UNUSED or not token.startswith("[PAD")
        }

    def adds_bos(self) -> bool:
        """True if a text starts with the BOS token."""
        default = self.model == "llama" or self.pre_tokenizer.bos
        return self.values.flag("add_bos_token", default) and self.special_token("bos") is not None

    def adds_eos(self) -> bool:
        """True if a text ends with the EOS token."""
        return self.values.flag("add_eos_token", False) and self.special_token("eos") is not None

    @property
    def pre_tokenizer(self) -> Any:
        """The pre-tokenizer of a byte-level vocabulary. Raises InputError for an unknown one, which would cut texts wrongly."""
        name = self.values.text("pre")
        if name not in PRE_TOKENIZERS:
            raise self.values.fail("pre", f"is {name!r}, which edgelora does not know; supported: {', '.join(PRE_TOKENIZERS)}")
        return PRE_TOKENIZERS[name]


def make_tokenizer(vocabulary: Vocabulary) -> str:
    """Makes the text of a tokenizer.json. Raises InputError for a vocabulary that is broken."""
    build = _build_byte_level if vocabulary.model == "gpt2" else _build_sentencepiece
    try:
        tokenizer = build(vocabulary)
        _add_special_tokens(tokenizer, vocabulary)
        text: str = tokenizer.to_str()
    except InputError:
        raise
    except Exception as error:  # the tokenizers package raises plain Exceptions
        raise InputError(f"the tokenizer in {vocabulary.values.path} is broken ({str(error)[:200]!r})") from error
    return text


def _build_byte_level(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    way = vocabulary.pre_tokenizer
    merges = [_split_merge(vocabulary, merge) for merge in vocabulary.values.texts("merges")]
    tokenizer: Any = Tokenizer(models.BPE(vocabulary.ids(), merges, ignore_merges=way.whole_words))
    if way.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = way.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_merge(vocabulary: Vocabulary, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not left or not space or not right:
        raise vocabulary.values.fail("merges", "has an entry that is not two tokens")
    return left, right


def _build_sentencepiece(vocabulary: Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = vocabulary.ids()
    prefix = vocabulary.values.flag("add_space_prefix", True)
    # Without an entry for each byte, SentencePiece writes the unknown token.
    by_bytes = ids.keys() >= set(_BYTES)
    unknown = vocabulary.special_token("unknown") or next(
        (token for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind == _UNKNOWN), None
    )
    merges = list(_find_merges(vocabulary, ids))
    tokenizer: Any = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=by_bytes))
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _find_merges(vocabulary: Vocabulary, ids: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Lists the pairs of tokens that make a token, the token of the highest score first.

    SentencePiece joins the neighbours whose token has the highest score, whatever two tokens they are. A tokenizer.json ranks
    pairs, so that each cut of a token in two is a pair of its rank:
    https://github.com/google/sentencepiece/blob/v0.2.0/src/bpe_model.cc
    """
    scores = vocabulary.values.numbers("scores", len(vocabulary.tokens))
    joined = np.isin(vocabulary.kinds, (_UNKNOWN, _CONTROL, _BYTE), invert=True)
    for index in np.argsort(-scores.astype(np.float64), kind="stable").tolist():
        token = vocabulary.tokens[index]
        if joined[index]:
            for cut in range(1, len(token)):
                if token[:cut] in ids and token[cut:] in ids:
                    yield token[:cut], token[cut:]


def _add_special_tokens(tokenizer: Any, vocabulary: Vocabulary) -> None:
    from tokenizers import AddedToken, processors

    takes_space = vocabulary.phi3 and vocabulary.model == "llama"

    def list_added(*kinds: int) -> list[AddedToken]:
        tokens = [vocabulary.tokens[index] for index in np.flatnonzero(np.isin(vocabulary.kinds, kinds))]
        return [AddedToken(token, normalized=False, rstrip=takes_space and token not in _PHI3_KEEPING_SPACE) for token in tokens]

    # All in one call each, as every call sorts all of them anew.
    tokenizer.add_special_tokens(list_added(_UNKNOWN, _CONTROL))
    tokenizer.add_tokens(list_added(_USER_DEFINED))
    bos, eos = vocabulary.special_token("bos"), vocabulary.special_token("eos")
    first = [bos] if vocabulary.adds_bos() else []
    last = [eos] if vocabulary.adds_eos() else []
    if first or last:
        single, pair = [*first, "$A", *last], [*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *last]
        special = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*first, *last])]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
