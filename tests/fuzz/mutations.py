"""Mutations of inputs: of bytes, of texts made of words, of values of JSON, and of files of safetensors."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    63,
    64,
    65,
    255,
    256,
    300,
    65535,
    1 << 24,
    (1 << 31) - 1,
    1 << 31,
    1 << 53,
    (1 << 63) - 1,
    1 << 64,
    10**400,
)
FLOATS = (0.5, -0.0, 1e-45, 1e30, 3e38, 3.5e38, 1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    "a",
    "*",
    ".",
    "../x",
    "/etc/passwd",
    "\x1b[2J",
    "a\nb",
    "\u202e",
    "\ud800",
    "\0",
    "é" * 40,
    "a" * 600,
    "null",
    "NaN",
    "1e999",
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": None}, [None], [0, 0])


def mutate_bytes(raw: bytes, chance: Random) -> bytes:
    """Changes, repeats, removes or inserts a few bytes."""
    changed = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        at = chance.randrange(len(changed) + 1)
        size = chance.choice((1, 1, 2, 4, 8, 32))
        match chance.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                changed[at:at] = chance.randbytes(size)
            case 2:
                del changed[at : at + size]
            case 3:
                changed[at : at + size] = chance.choice((0, 1, 0x7F, 0x80, 0xFF)).to_bytes(1, "little") * size
            case _:
                start = chance.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + size * 4]
    return bytes(changed)


def mutate_text(text: str, chance: Random, words: Sequence[str]) -> str:
    """Inserts words, and moves, repeats or removes pieces of a text."""
    for _ in range(chance.choice((1, 1, 2, 3, 5))):
        at, start = chance.randrange(len(text) + 1), chance.randrange(len(text) + 1)
        size = chance.choice((1, 2, 5, 10, 40, 200))
        match chance.randrange(5):
            case 0 | 1:
                text = text[:at] + chance.choice(words) + text[at:]
            case 2:
                text = text[:at] + text[at + size :]
            case 3:
                text = text[:at] + text[start : start + size] + text[at:]
            case _:
                text = text[:at] + str(chance.choice((*NUMBERS[:-1], *FLOATS, *TEXTS))) + text[at + size :]
    return text


def mutate_value(value: Any, chance: Random, words: Sequence[Any] = ()) -> Any:
    """Changes a few places of a value of JSON, in place. words: values to put somewhere, beside hard ones."""
    root = [value]
    for _ in range(chance.choice((1, 1, 1, 2, 3, 5))):
        holder, key = _choose_place(root, chance)
        match chance.randrange(8):
            case 0 | 1:
                holder[key] = _choose_value(chance, words)
            case 2:
                holder[key] = _change_leaf(holder[key], chance, words)
            case 3:
                giver, other = _choose_place(root, chance)
                holder[key] = copy.deepcopy(giver[other])
            case 4 if holder is not root:
                del holder[key]
            case 5 if isinstance(holder, dict):
                holder[str(_change_leaf(key, chance, words))] = holder.pop(key)
            case 6 if isinstance(holder, list) and holder is not root:
                holder[key:key] = [copy.deepcopy(holder[key])] * chance.choice((1, 2, 40))
            case _:
                inner = holder[key]
                if isinstance(inner, dict):
                    inner[str(_choose_value(chance, words))[:40]] = _choose_value(chance, words)
                elif isinstance(inner, list):
                    inner.append(_choose_value(chance, words))
                else:
                    holder[key] = chance.choice(([inner], {"x": inner}))
    return root[0]


def mutate_json(raw: bytes, chance: Random, words: Sequence[Any] = ()) -> bytes:
    """Changes a JSON document: mostly its values, seldom its bytes."""
    try:
        value = json.loads(raw)
        if chance.randrange(12):
            return dump(mutate_value(value, chance, words), chance)
    except (ValueError, RecursionError):
        pass
    return mutate_bytes(raw, chance)


def dump(value: Any, chance: Random) -> bytes:
    """Writes a value as JSON. Lone surrogates are escaped."""
    try:
        return json.dumps(value, ensure_ascii=chance.random() < 0.5).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def mutate_safetensors(raw: bytes, chance: Random, change_header: Callable[[bytes], bytes]) -> bytes:
    """Changes a safetensors file: its header, whose length stays right, or its values."""
    size = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + size], raw[8 + size :]
    if chance.randrange(4) == 0:
        data = mutate_bytes(data, chance)
    if chance.randrange(4):
        header = change_header(header)
    raw = len(header).to_bytes(8, "little") + header + data
    return raw if chance.randrange(12) else mutate_bytes(raw, chance)


def _choose_place(root: list[Any], chance: Random) -> tuple[Any, Any]:
    """Chooses a place of a value that can be set: a holder, and a key or an index. Each depth is as likely as another."""
    path: list[tuple[Any, Any]] = []
    holder: Any = root
    while isinstance(holder, dict | list) and holder:
        key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
        path.append((holder, key))
        holder = holder[key]
    return chance.choice(path)


def _choose_value(chance: Random, words: Sequence[Any]) -> Any:
    if words and chance.random() < 0.5:
        return copy.deepcopy(chance.choice(words))
    return copy.deepcopy(chance.choice(chance.choice((NUMBERS, FLOATS, TEXTS, OTHERS))))


def _change_leaf(value: Any, chance: Random, words: Sequence[Any]) -> Any:
    if isinstance(value, str):
        return mutate_text(value, chance, [*TEXTS, *(word for word in words if isinstance(word, str))])
    if isinstance(value, int | float):
        return chance.choice((value + 1, value - 1, -value, value * 2, float(max(min(value, 10**300), -(10**300))), str(value)))
    return _choose_value(chance, words)
