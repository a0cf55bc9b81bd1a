"""The tokens of a completion after a prompt that has been encoded without it, as at run time."""

from __future__ import annotations

from typing import Any

from edgelora_export.base.tokenizer import encode_prompt

# Texts that a completion can follow without merging into their last token. One that starts with a letter follows a line break.
_BEFORE = ("\n", "0", ".", "a", "…")


def encode_apart(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], int]:
    """Encodes a prompt, and then its completion. Also returns the number of the prompt's tokens.

    tokenizer: of transformers. Where the two would share a token if they were encoded together, the completion's tokens are those
    that it has after another text.
    """
    before = encode_prompt(tokenizer, prompt)
    whole = encode_prompt(tokenizer, prompt + completion)
    if whole[: len(before)] == before:
        return whole, len(before)
    return [*before, *_encode_after(tokenizer, completion)], len(before)


def _encode_after(tokenizer: Any, text: str) -> list[int]:
    """Encodes a text as the continuation of another one: without tokens of beginning, and without a space before it."""

    def encode(part: str) -> list[int]:
        ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    for before in _BEFORE:
        head, both = encode(before), encode(before + text)
        if both[: len(head)] == head:
            return both[len(head) :]
    return encode(text)
