"""Finds the tokens that end an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_export.texts.packing import read_special_tokens, read_templates
from edgelora_runtime.bundle.chat_template import DEFAULT_TEMPLATE
from edgelora_runtime.bundle.chat_template import find_turn_end as find_closing_token
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def find_end_tokens(tokenizer: Any, configs: Sequence[Mapping[str, Any]], vocab_size: int) -> tuple[int, ...]:
    """Returns the ids of all tokens that end an answer, the tokenizer's own first: it is the one that training teaches.

    They are the eos tokens of the tokenizer and of configs (generation_config.json and config.json), and the token with which the
    chat template closes an assistant's turn. Ids outside the vocabulary are left out: some configs say -1 for none.
    """
    found = [tokenizer.eos_token_id]
    for config in configs:
        ids = config.get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
    found.append(find_turn_end(tokenizer))
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int) and 0 <= token < vocab_size))


def find_turn_end(tokenizer: Any) -> int | None:
    """Returns the added token with which the default chat template closes an assistant's turn.

    Returns None without a template, if other text follows an answer, and if the template takes no plain conversation.
    """
    source = read_templates(tokenizer).get(DEFAULT_TEMPLATE)
    if source is None:
        return None
    return find_closing_token(source, tokenizer.backend_tokenizer, read_special_tokens(tokenizer))


def resolve_end_tokens(tokenizer: Any, named: Sequence[str | int], vocab_size: int) -> tuple[int, ...]:
    """Returns the ids of end tokens that a recipe names by text or id.

    Raises InputError for all that are not one token of the tokenizer, or no token of the model.
    """
    ids = tuple(_resolve(tokenizer, vocab_size, named))
    if wrong := [name for name, token in zip(named, ids, strict=True) if token is None]:
        raise InputError(
            f"end_tokens names {', '.join(map(repr, wrong))}, which the model has no token for; give texts of whole "
            f"tokens, or ids below {vocab_size}"
        )
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _resolve(tokenizer: Any, vocab_size: int, named: Sequence[str | int]) -> Iterator[int | None]:
    vocabulary = tokenizer.get_vocab()
    for name in named:
        token = name if isinstance(name, int) else vocabulary.get(name)
        yield token if token is not None and 0 <= token < vocab_size else None
