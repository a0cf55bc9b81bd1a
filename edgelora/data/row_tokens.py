"""Encodes a row as a request does: the tokens of its prompt alone, and then those of its completion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_export.base.tokenizer import encode_prompt

if TYPE_CHECKING:
    from edgelora.data.rows import Row

# Texts that a completion can follow without merging into their last token. One that starts with a letter follows a line break.
_BEFORE = ("\n", "0", ".", "a", "…")


def encode_row(tokenizer: Any, row: Row) -> tuple[list[int], int]:
    """Encodes a row with a tokenizer of transformers. Also returns the number of its prompt's tokens.

    At run time a model sees the tokens of the prompt alone. Where prompt and completion would share a token if they were encoded
    together, the completion's tokens are those that it has after another text.
    """
    prompt = encode_prompt(tokenizer, row.prompt)
    whole = encode_prompt(tokenizer, row.prompt + row.completion)
    if whole[: len(prompt)] == prompt:
        return whole, len(prompt)
    return [*prompt, *_encode_after(tokenizer, row.completion)], len(prompt)


def encode_taught_row(tokenizer: Any, row: Row) -> dict[str, list[int]]:
    """Encodes a row for training, with the token that ends its completion.

    Returns input_ids, and completion_mask, which is 1 for tokens to learn. The end is the tokenizer's eos token, once.
    """
    ids, start = encode_row(tokenizer, row)
    if ids[-1] != tokenizer.eos_token_id or len(ids) == start:
        ids = [*ids, tokenizer.eos_token_id]
    return {"input_ids": ids, "completion_mask": [0] * start + [1] * (len(ids) - start)}


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
