"""The texts of a GGUF base: the files that transformers would have saved beside its weights, made from the metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgelora_export.base.gguf.tokenizer import Vocabulary, make_tokenizer
from edgelora_export.base.gguf.values import Values

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_CHAT_TEMPLATE = "tokenizer.chat_template"
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# Tokens that end a turn where no key says so, as in llama.cpp ("auto-detect special tokens by text"):
# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
_CALL_END = "<|eom_id|>"


class TextsOfGguf(Mapping[str, bytes]):
    """The texts of a GGUF base, each made when it is asked for. A tokenizer.json of 262144 tokens takes seconds."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self._path, self._metadata, self._config = path, metadata, config
        self._makers: dict[str, Callable[[], bytes]] = {
            "config.json": lambda: _to_json(config),
            "generation_config.json": lambda: _to_json(self._make_generation_config()),
        }
        if "tokenizer.ggml.model" in metadata:
            self._makers["tokenizer.json"] = lambda: self._tokenizer
            self._makers["tokenizer_config.json"] = lambda: _to_json(self._make_tokenizer_config())
        if _CHAT_TEMPLATE in metadata:
            template = Values(path, metadata, "tokenizer.").text("chat_template")
            self._makers["chat_template.jinja"] = template.encode
        for name in self._named_templates():
            template = Values(path, metadata, "tokenizer.").text(f"chat_template.{name}")
            self._makers[f"additional_chat_templates/{name}.jinja"] = template.encode

    def __getitem__(self, name: str) -> bytes:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._makers))

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.read(self._path, self._metadata)

    @cached_property
    def _tokenizer(self) -> bytes:
        return make_tokenizer(self._vocabulary).encode()

    def _named_templates(self) -> list[str]:
        names = self._metadata.get("tokenizer.chat_templates", [])
        return [name for name in names if name.isidentifier()] if isinstance(names, list) else []

    def _make_tokenizer_config(self) -> dict[str, Any]:
        roles = {role: self._vocabulary.special_token(key) for role, key in _ROLES.items()}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
            "clean_up_tokenization_spaces": False,
            "model_max_length": self._config["max_position_embeddings"],
        } | {role: token for role, token in roles.items() if token is not None}

    def _make_generation_config(self) -> dict[str, Any]:
        config = {key: self._config[key] for key in ("bos_token_id", "pad_token_id") if self._config.get(key) is not None}
        ends = self._find_ends() if "tokenizer.ggml.model" in self._metadata else []
        return config | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})

    def _find_ends(self) -> list[int]:
        """Finds the ids of the tokens that end an answer: of a text, of a turn, and of a call of a tool."""
        vocabulary = self._vocabulary
        ids = {token: index for index, token in enumerate(vocabulary.tokens)}
        named = [vocabulary.special_token(key) for key in ("eos", "eot", "eom")]
        if named[1] is None:
            named += [token for token in _TURN_ENDS if token in ids]
        if named[2] is None and _CALL_END in ids:
            named.append(_CALL_END)
        return list(dict.fromkeys(ids[token] for token in named if token is not None))


def _to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
