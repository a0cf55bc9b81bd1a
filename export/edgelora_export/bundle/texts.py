"""Copies the base's tokenizer and configs unchanged into the bundle, and reads their end tokens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgelora_export.weights.publish import write_file
from edgelora_runtime.bundle.tokenizer import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_export.base.base import Base

_GENERATION_CONFIG = "generation_config.json"
_COPIED = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, "config.json", _GENERATION_CONFIG)


def copy_texts(base: Base, folder: Path) -> None:
    """Copies the tokenizer and the configs. A chat template inside tokenizer_config.json gets its own file.

    Raises InputError for a base without tokenizer.json.
    """
    if TOKENIZER not in base.texts:
        raise InputError(f"base {base.path} has no {TOKENIZER}; save its fast tokenizer there (save_pretrained does)")
    for name in _COPIED:
        if name in base.texts:
            write_file(folder / name, [base.texts[name]])
    if not (folder / CHAT_TEMPLATE).exists() and TOKENIZER_CONFIG in base.texts:
        template = json.loads(base.texts[TOKENIZER_CONFIG]).get("chat_template")
        if isinstance(template, str):
            write_file(folder / CHAT_TEMPLATE, [template.encode()])


def read_generation_settings(base: Base) -> dict[str, Any]:
    """Reads the settings in generation_config.json that are not null. Returns {} without the file."""
    settings: dict[str, Any] = json.loads(base.texts.get(_GENERATION_CONFIG, b"{}"))
    return {key: value for key, value in settings.items() if value is not None}


def read_end_tokens(base: Base) -> tuple[int, ...]:
    """Reads the ids of the tokens that end a text, from generation_config.json if it has any, else from config.json."""
    ids = read_generation_settings(base).get("eos_token_id")
    if ids is None:
        ids = base.config.get("eos_token_id")
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)
