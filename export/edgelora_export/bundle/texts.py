"""Copies the base's tokenizer and configs unchanged into the bundle, and reads their end tokens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgelora_export.weights.publish import write_file
from edgelora_runtime.bundle.chat_template import CHAT_TEMPLATE, DEFAULT_TEMPLATE, check_template, name_template
from edgelora_runtime.bundle.tokenizer import TOKENIZER, TOKENIZER_CONFIG
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgelora_export.base.base import Base

_GENERATION_CONFIG = "generation_config.json"
_COPIED = (TOKENIZER, TOKENIZER_CONFIG, "config.json", _GENERATION_CONFIG)
_NAMED_TEMPLATES = "additional_chat_templates/"  # a folder with a file per name


def copy_texts(base: Base, folder: Path) -> None:
    """Copies the tokenizer and the configs, and writes a file per chat template.

    Raises InputError for a base without tokenizer.json, or with a chat template that is not valid.
    """
    if TOKENIZER not in base.texts:
        raise InputError(f"base {base.path} has no {TOKENIZER}; save its fast tokenizer there (save_pretrained does)")
    templates = read_templates(base.texts)
    for name, raw in templates.items():
        check_template(raw, f"base {base.name}: {name_template(name)}")
    for name in _COPIED:
        if name in base.texts:
            write_file(folder / name, [base.texts[name]])
    for name, raw in templates.items():
        write_file(folder / name_template(name), [raw])


def read_templates(texts: Mapping[str, bytes]) -> dict[str, bytes]:
    """Reads the chat templates of a base by name, from files of their own or else from tokenizer_config.json.

    Raises InputError for a template without text.
    """
    files = {name: raw for name, raw in texts.items() if name.startswith(_NAMED_TEMPLATES) and name.endswith(".jinja")}
    named = {name.removeprefix(_NAMED_TEMPLATES).removesuffix(".jinja"): raw for name, raw in files.items()}
    if CHAT_TEMPLATE in texts:
        named[DEFAULT_TEMPLATE] = texts[CHAT_TEMPLATE]
    if named or TOKENIZER_CONFIG not in texts:
        return named
    found = json.loads(texts[TOKENIZER_CONFIG]).get("chat_template") or {}
    if isinstance(found, list):
        found = {
            entry["name"]: entry["template"]
            for entry in found
            if isinstance(entry, dict) and entry.keys() >= {"name", "template"}
        }
    if isinstance(found, str):
        found = {DEFAULT_TEMPLATE: found}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise InputError(f"{TOKENIZER_CONFIG} has a chat_template that is neither text nor a list of named texts")
    return {name: text.encode() for name, text in found.items()}


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
