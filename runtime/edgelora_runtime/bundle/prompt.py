"""Prompts as text, messages or token ids, checked at the door, and their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelora_runtime.bundle.messages import CHAT_OPTIONS, Chat, check_chat, is_message
from edgelora_runtime.bundle.router import find_last_request
from edgelora_runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora_runtime.bundle.manifest import ModelEntry
    from edgelora_runtime.bundle.messages import ChatOptions, Message
    from edgelora_runtime.bundle.tokenizer import Tokenizer

    Prompt = str | Sequence[Message] | Sequence[int]
    CheckedPrompt = str | list[int] | Chat


def check_prompt(prompt: Prompt, options: ChatOptions) -> CheckedPrompt:
    """Checks a prompt and what its chat template is given.

    Raises InputError for a list of anything but messages or token ids, or for messages that cannot be used. Raises UsageError for
    template options that cannot be used, or that a prompt without messages has no use for.
    """
    if not isinstance(prompt, str) and len(prompt) and all(map(is_message, prompt)):
        return check_chat(prompt, options)
    if unused := [name for name in CHAT_OPTIONS if options.get(name) not in (None, False)]:
        kind = "text" if isinstance(prompt, str) else "a list of token ids"
        raise UsageError(f"{' and '.join(unused)}: only a chat template reads this, but the prompt is {kind}; pass messages")
    if isinstance(prompt, str):
        return prompt
    tokens = [int(item) for item in prompt if isinstance(item, int | np.integer)]
    if len(tokens) < len(prompt):
        raise InputError("a prompt is text, a list of messages, or a list of token ids; this list holds something else")
    return tokens


def encode_prompt(tokenizer: Tokenizer, prompt: CheckedPrompt) -> list[int]:
    """Returns the tokens of a checked prompt."""
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt)
    return tokenizer.encode_chat(prompt) if isinstance(prompt, Chat) else prompt


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


def find_routed_text(tokenizer: Tokenizer, prompt: CheckedPrompt, model: ModelEntry) -> str:
    """Returns the text that a router sees.

    It is a prompt's own text, the last request among its messages, or the text of its tokens.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Chat):
        return find_last_request(prompt.messages)
    return tokenizer.decode(check_tokens(prompt, model))
