"""KV caches of earlier requests, for later ones on the same choice with the same first tokens."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelora_runtime.session.kv_cache import shared_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from edgelora_runtime.bundle.choice import Choice
    from edgelora_runtime.session.kv_cache import Floats, KVCache


@dataclass(frozen=True)
class CachedPrompt:
    """An idle KV cache and the choice that computed its keys and values."""

    choice: Choice
    cache: KVCache


@dataclass(frozen=True)
class SavedPrompt:
    """A copy of a KV cache's content. state: as KVCache.state() returns it."""

    choice: Choice
    tokens: tuple[int, ...]
    state: Mapping[str, Floats]

    @property
    def float_type(self) -> np.dtype[Any]:
        return next(iter(self.state.values())).dtype

    @classmethod
    def of(cls, choice: Choice, cache: KVCache) -> SavedPrompt:
        state = {name: array.copy() for name, array in cache.state(len(cache.tokens)).items()}
        return cls(choice, tuple(cache.tokens), state)


class PromptCache:
    """Idle KV caches, the least recently used first.

    budget: bytes of keys and values, or None for no limit.
    """

    def __init__(self, budget: int | None = None) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._entries: list[CachedPrompt] = []

    @property
    def bytes(self) -> int:
        with self._lock:
            return sum(entry.cache.bytes for entry in self._entries)

    def copy(self) -> list[SavedPrompt]:
        """Copies all cached prompts, the least recently used first."""
        with self._lock:
            return [SavedPrompt.of(entry.choice, entry.cache) for entry in self._entries if entry.cache.tokens]

    def count_tokens(self, choice: Choice) -> int:
        """Returns the number of tokens in the longest cache of this choice."""
        with self._lock:
            return max((len(entry.cache.tokens) for entry in self._entries if entry.choice == choice), default=0)

    def take(self, choice: Choice, tokens: Sequence[int], new: Callable[[], KVCache]) -> KVCache:
        """Takes the cache that shares the longest prefix with the tokens.

        One request has it to itself and must put() it back. If the request would drop more of the cache than it uses, as when two
        conversations share only their first lines, the prefix is copied, and the cache stays for its own conversation.
        """
        with self._lock:
            mine = [entry for entry in self._entries if entry.choice == choice]
            if not mine:
                return new()
            used, entry = max(((shared_prefix(each.cache.tokens, tokens), each) for each in mine), key=lambda pair: pair[0])
            if 2 * used >= len(entry.cache.tokens):
                self._entries.remove(entry)
                return entry.cache
            cache = new()
            if used:
                cache.restore(tokens[:used], entry.cache.state(used))
            return cache

    def put(self, choice: Choice, cache: KVCache) -> None:
        """Keeps a cache for later requests, in place of those that it extends."""
        cache.drop_logits()
        with self._lock:
            self._entries = [
                entry
                for entry in self._entries
                if entry.choice != choice or entry.cache.tokens != cache.tokens[: len(entry.cache.tokens)]
            ]
            self._entries.append(CachedPrompt(choice, cache))
            if self._budget is not None:
                while self._entries and sum(entry.cache.bytes for entry in self._entries) > self._budget:
                    del self._entries[0]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
