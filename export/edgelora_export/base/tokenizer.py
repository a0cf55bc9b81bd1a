"""Loads the tokenizer of a base as transformers makes it: the one that training, search, the torch reference and export use."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgelora_export.base.quiet import first_line, quiet_libraries
from edgelora_export.base.texts import as_folder
from edgelora_runtime.bundle.tokenizer import TOKENIZER
from edgelora_runtime.bundle.tokenizer_parts import check_merges
from edgelora_runtime.errors import InputError, IntegrityError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora_export.base.base import Base

TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(base: Base) -> Any:
    """Loads the tokenizer of a base. See read_tokenizer."""
    return read_tokenizer(base.texts, f"base {base.path}")


def read_tokenizer(texts: Mapping[str, bytes], owner: str) -> Any:
    """Loads a fast tokenizer of transformers from files, by name. Returns a PreTrainedTokenizerFast.

    transformers decides what the files mean: classes that rebuild their pipeline, special tokens that stand beside
    tokenizer.json, and conversions from sentencepiece or vocab.json with merges.txt. Truncation and padding that a file has left
    on are off. Code that comes with the files never runs. owner: names them in errors.
    Raises InputError for files that transformers cannot load, or from which it makes no fast tokenizer.
    """
    if not any(name in texts for name in VOCABULARIES):
        raise InputError(f"{owner} has no tokenizer.json; save its tokenizer there (save_pretrained does)")
    try:
        check_merges(texts.get(TOKENIZER, b""), f"{owner}: {TOKENIZER}")
    except IntegrityError as error:
        raise InputError(str(error)) from None
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("transformers", "export") from error
    try:
        with quiet_libraries(whole_process=False), as_folder(texts) as folder:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # broken files raise anything, and a hostile pattern pyo3's PanicException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        if _has_own_code(texts):
            raise InputError(
                f"the tokenizer of {owner} is code of its own, which is never run; save it as a fast tokenizer, and delete "
                f"auto_map from {TOKENIZER_CONFIG}"
            ) from None
        hint = "save it again as a fast tokenizer (tokenizer.json)"
        raise InputError(f"the tokenizer of {owner} cannot be loaded ({_printable(error)}); {hint}") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"the tokenizer of {owner} is a {type(tokenizer).__name__}, which has no fast tokenizer; save one (tokenizer.json)"
        )
    backend.no_truncation()
    backend.no_padding()
    return tokenizer


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Encodes a plain prompt with a tokenizer of transformers, with its own special tokens, as a bundle does.

    There is never a second token of beginning: a text that was rendered with a chat template has one already.
    """
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    start = tokenizer.bos_token_id
    if start is not None and ids[:2] == [start, start] and tokenizer("")["input_ids"][:1] == [start]:
        return ids[1:]
    return ids


def _has_own_code(texts: Mapping[str, bytes]) -> bool:
    """True if tokenizer_config.json names a class in a file beside it."""
    try:
        config = json.loads(texts.get(TOKENIZER_CONFIG, b"{}"))
        named = config.get("auto_map")
    except (ValueError, AttributeError, RecursionError):
        return False  # transformers reports what is wrong
    return bool(named if not isinstance(named, dict) else named.get("AutoTokenizer"))


def _printable(error: BaseException) -> str:
    """Returns the first line of an error without characters that a terminal would obey."""
    return "".join(filter(str.isprintable, first_line(error)))
