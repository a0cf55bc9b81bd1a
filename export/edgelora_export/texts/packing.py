"""Packs a tokenizer as transformers resolved it into the files of a bundle, from which the runtime makes the same tokens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgelora_runtime.bundle.chat_template import DEFAULT_TEMPLATE, check_template, name_template
from edgelora_runtime.bundle.tokenizer import TOKENIZER, TOKENIZER_CONFIG

if TYPE_CHECKING:
    from collections.abc import Mapping

# The class that takes tokenizer.json as it stands, whatever class made it. Every version of transformers has it.
_CLASS = "PreTrainedTokenizerFast"


def pack_tokenizer(tokenizer: Any, owner: str) -> dict[str, bytes]:
    """Packs tokenizer.json, tokenizer_config.json and the chat templates, by file name.

    tokenizer: a PreTrainedTokenizerFast. Everything that decides tokens goes into tokenizer.json: special tokens that stood
    elsewhere, and the pipeline of a class that makes its own. tokenizer_config.json holds the special tokens that templates name.
    Raises InputError for a template that is not valid, or whose name cannot be a file's.
    """
    files = {TOKENIZER: tokenizer.backend_tokenizer.to_str().encode(), TOKENIZER_CONFIG: _pack_config(tokenizer)}
    for name, source in read_templates(tokenizer).items():
        file = name_template(name)
        check_template(source.encode(), f"{owner}: {file}")
        files[file] = source.encode()
    return files


def read_templates(tokenizer: Any) -> Mapping[str, str]:
    """Reads the chat templates of a tokenizer, by name. A single one is the default."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, str):
        found = {DEFAULT_TEMPLATE: found}
    return found or {}


def read_special_tokens(tokenizer: Any) -> dict[str, str]:
    """Reads the special tokens that have a role, by role (bos_token, …), and only those that are set."""
    return {role: str(token) for role, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}


def _pack_config(tokenizer: Any) -> bytes:
    extra = getattr(tokenizer, "extra_special_tokens", None) or getattr(tokenizer, "additional_special_tokens", None)
    config: dict[str, Any] = {"tokenizer_class": _CLASS, "clean_up_tokenization_spaces": False}
    if getattr(tokenizer, "split_special_tokens", False):
        config["split_special_tokens"] = True
    config |= read_special_tokens(tokenizer)
    if isinstance(extra, list | tuple) and extra:
        config["additional_special_tokens"] = [str(token) for token in extra]
    return (json.dumps(config, ensure_ascii=False, indent=1) + "\n").encode()
