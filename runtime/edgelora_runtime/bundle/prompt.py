"""Prompts as text, messages or token ids, and their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgelora_runtime.bundle.router import find_last_request
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from edgelora_runtime.bundle.manifest import ModelEntry
    from edgelora_runtime.bundle.tokenizer import Message, Tokenizer

    Prompt = str | Sequence[Message] | Sequence[int]


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Returns a prompt's tokens.

    Raises InputError for a list of anything but messages or token ids.
    """
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt)
    messages = [item for item in prompt if isinstance(item, Mapping)]
    tokens = [int(item) for item in prompt if isinstance(item, int | np.integer)]
    if len(tokens) == len(prompt):
        return tokens
    if len(messages) < len(prompt):
        raise InputError("a prompt is text, a list of messages, or a list of token ids; this list holds something else")
    return tokenizer.encode_chat(messages)


def check_tokens(token_ids: Sequence[int], model: ModelEntry, *, may_overflow: bool = False) -> list[int]:
    """Checks the tokens of a prompt and returns them as a list.

    Raises InputError if there are none, more than the context holds, or one outside the vocabulary.
    """
    tokens = list(token_ids)
    if not tokens:
        raise InputError("the prompt is empty: it has no tokens; give at least one character")
    if len(tokens) > model.context_length and not may_overflow:
        raise InputError(f"the prompt has {len(tokens)} tokens, but the context holds {model.context_length}; shorten it")
    if wrong := next((token for token in tokens if not 0 <= token < model.vocab_size), None):
        raise InputError(f"token {wrong} is outside the vocabulary of {model.vocab_size}")
    return tokens


def find_routed_text(tokenizer: Tokenizer, prompt: Prompt, model: ModelEntry) -> str:
    """Returns the text that a router sees.

    It is a prompt's own text, the last request among its messages, or the text of its tokens.
    """
    if isinstance(prompt, str):
        return prompt
    messages = [item for item in prompt if isinstance(item, Mapping)]
    if messages and len(messages) == len(prompt):
        return find_last_request(messages)
    return tokenizer.decode(check_tokens(encode_prompt(tokenizer, prompt), model))
