"""Prompts as text, messages or token ids, checked at the door, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgelora_runtime.arguments import is_whole, show
from edgelora_runtime.bundle.messages import CHAT_OPTIONS, Chat, check_chat, is_message
from edgelora_runtime.bundle.router import find_last_request
from edgelora_runtime.errors import InputError, UsageError

if TYPE_CHECKING:
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
    if not isinstance(prompt, str):
        prompt = _check_list(prompt)
        if len(prompt) and all(map(is_message, prompt)):
            return check_chat(prompt, options)
    if unused := [name for name in CHAT_OPTIONS if options.get(name) not in (None, False)]:
        kind = "text" if isinstance(prompt, str) else "a list of token ids"
        raise UsageError(f"{' and '.join(unused)}: only a chat template reads this, but the prompt is {kind}; pass messages")
    if isinstance(prompt, str):
        return prompt
    return _check_ids(prompt)


def _check_list(prompt: Any) -> Sequence[Any]:
    """Returns a prompt that is no text as a sequence: a list, a tuple, a range, or a numpy array of one axis."""
    if isinstance(prompt, np.ndarray) and prompt.ndim == 1:
        return cast("Sequence[Any]", prompt)
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray | memoryview):
        return prompt
    more = "; one message goes into a list" if is_message(prompt) else ""
    raise InputError(f"a prompt is text, a list of messages, or a list of token ids, not {type(prompt).__name__}{more}")


def _check_ids(token_ids: Sequence[Any]) -> list[int]:
    tokens = [int(item) for item in token_ids if is_whole(item)]
    if len(tokens) < len(token_ids):
        raise InputError("a prompt is text, a list of messages, or a list of token ids; this list holds something else")
    return tokens


def encode_prompt(tokenizer: Tokenizer, prompt: CheckedPrompt, *, limit: int | None = None) -> list[int]:
    """Returns the tokens of a checked prompt. limit: the most tokens, for texts that are refused before they are tokenized."""
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt, limit=limit)
    return tokenizer.encode_chat(prompt, limit=limit) if isinstance(prompt, Chat) else prompt


def check_tokens(token_ids: Sequence[int], model: ModelEntry, *, may_overflow: bool = False) -> list[int]:
    """Checks the tokens of a prompt and returns them as a list.

    Raises InputError if there are none, more than the context holds, or one outside the vocabulary.
    """
    if isinstance(token_ids, str):
        raise InputError("token ids are a list of whole numbers, not a text; encode() makes them from one")
    tokens = _check_ids(_check_list(token_ids))
    if not tokens:
        raise InputError("the prompt is empty: it has no tokens; give at least one character")
    if len(tokens) > model.context_length and not may_overflow:
        raise InputError(f"the prompt has {len(tokens)} tokens, but the context holds {model.context_length}; shorten it")
    if wrong := next((token for token in tokens if not 0 <= token < model.vocab_size), None):
        raise InputError(f"token {show(wrong)} is outside the vocabulary of {model.vocab_size}")
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
