"""Draft tables: likely next tokens by context, counted in an adapter's training data.

The file's layout is in docs/reference/bundle-format.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edgelora_runtime.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DRAFT_TABLE = ".drafts.safetensors"  # end of its file's name, after the file's SHA-256
MAX_CONTEXT = 3  # tokens; 4 and 6 predict no better (docs/log.md)
MAX_ENTRIES = 1 << 14
TABLE_LIMIT = 1 << 20  # bytes of a table's file
_NONE = -1  # in place of the tokens that a shorter context lacks
_SHAPES = {"contexts": (np.int32, (MAX_CONTEXT,)), "tokens": (np.int32, ()), "shares": (np.uint8, ())}

Value = TypeVar("Value")


def find_longest(entries: Mapping[tuple[int, ...], Value], tail: tuple[int, ...]) -> tuple[tuple[int, ...], Value | None]:
    """Returns the longest suffix of some tokens that is a key, with its value.

    Returns () and None if there is none.
    """
    found = entries.get(tail)
    while found is None and tail:
        tail = tail[1:]
        found = entries.get(tail)
    return tail, found


class DraftTable:
    """Likely next tokens by context.

    entries: for 1 to MAX_CONTEXT tokens, the likeliest next one and its share, 0 to 1.
    """

    def __init__(self, entries: Mapping[tuple[int, ...], tuple[int, float]]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, text: Sequence[int]) -> tuple[int, float] | None:
        """Returns the next token and its share for the longest context that ends the text.

        Returns None if no context matches.
        """
        return find_longest(self._entries, tuple(text[-MAX_CONTEXT:]))[1]

    def limit(self, vocab_size: int) -> DraftTable:
        """Returns the table without entries that propose a token outside a vocabulary."""
        return DraftTable({context: entry for context, entry in self._entries.items() if entry[0] < vocab_size})

    def dump(self) -> bytes:
        """Serializes the table as the bytes of its file."""
        contexts = [(_NONE,) * (MAX_CONTEXT - len(context)) + context for context in self._entries]
        return save(
            {
                "contexts": np.array(contexts, np.int32).reshape(-1, MAX_CONTEXT),
                "tokens": np.array([token for token, _ in self._entries.values()], np.int32),
                "shares": np.array([round(share * 255) for _, share in self._entries.values()], np.uint8),
            }
        )

    @classmethod
    def read(cls, raw: bytes, name: str, vocab_size: int) -> DraftTable:
        """Parses a table's file. IntegrityError says what is wrong with it."""
        try:
            tensors = load(raw)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:  # the last three for types that numpy lacks
            raise IntegrityError(f"{name} is not a readable safetensors file ({error})") from error
        if tensors.keys() != _SHAPES.keys():
            raise IntegrityError(f"{name} holds {', '.join(sorted(tensors)[:4]) or 'nothing'}, not {', '.join(_SHAPES)}")
        count = tensors["tokens"].size
        if count > MAX_ENTRIES:
            raise IntegrityError(f"{name} has {count} entries; a table has at most {MAX_ENTRIES}")
        for key, (kind, row) in _SHAPES.items():
            found = tensors[key]
            if found.dtype != kind or found.shape != (count, *row):
                raise IntegrityError(f"{name}: {key} is {found.dtype} {found.shape}, not {np.dtype(kind)} {(count, *row)}")
        contexts, tokens = tensors["contexts"], tensors["tokens"]
        absent = contexts == _NONE
        if (absent[:, 1:] & ~absent[:, :-1]).any() or absent[:, -1:].any():
            raise IntegrityError(f"{name}: a context has a gap, or no token")
        if count and (min(contexts.min() + 1, tokens.min()) < 0 or max(contexts.max(), tokens.max()) >= vocab_size):
            raise IntegrityError(f"{name}: a token is outside the vocabulary of {vocab_size}")
        lengths = MAX_CONTEXT - absent.sum(axis=1)
        keys = (tuple(row[-length:]) for row, length in zip(contexts.tolist(), lengths.tolist(), strict=True))
        shares = (tensors["shares"] / np.float32(255)).tolist()
        return cls(dict(zip(keys, zip(tokens.tolist(), shares, strict=True), strict=True)))
