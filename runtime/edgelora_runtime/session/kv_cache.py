"""The interface of a KV cache: the tokens that were read, and the buffers to bind.

It is the same however a graph writes the cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgelora_runtime.bundle.manifest import ModelEntry
    from edgelora_runtime.session.binding import Binding

    Floats = NDArray[np.floating[Any]]  # float32, or float16 in graphs for a GPU

_KEPT_ROWS = 16  # positions of logits whose memory is reused
_SMALLEST = 256  # positions; the capacity doubles from here as needed


class KVCache(ABC):
    """Keys and values of the tokens that one variant has read.

    float_type: of keys and values. tokens: the token at each position. logits: float32 (1, kept, V), written by the last step.
    They belong to the cache and not to the model, since a cache has one owner.
    """

    _copies = 1  # buffers of each key and value

    def __init__(self, entry: ModelEntry, float_type: np.dtype[Any]) -> None:
        self.tokens: list[int] = []
        self._entry = entry
        self._float_type = float_type
        self._peak = 0  # the most tokens it has held
        self.drop_logits()

    @property
    @abstractmethod
    def capacity(self) -> int:
        """The positions that fit into its buffers, in tokens."""

    @property
    def bytes(self) -> int:
        """The bytes of the keys and values that were written.

        Reserved memory that was never touched takes none.
        """
        return self._copies * self._peak * count_position_bytes(self._entry, self._float_type)

    @abstractmethod
    def bind(self, binding: Binding, count: int, keep: int) -> None:
        """Binds its buffers for a step of `count` tokens that writes the logits of the last `keep`."""

    @abstractmethod
    def state(self, length: int) -> dict[str, Floats]:
        """Returns views of the first `length` tokens' keys and values.

        They are named {layer}.key and {layer}.value, each (kv_heads, length, head_size).
        """

    @abstractmethod
    def _allocate_buffers(self, positions: int, state: Mapping[str, Floats]) -> None:
        """Allocates new buffers for that many positions.

        Copies the state into the first ones. {} is no state.
        """

    def reserve(self, positions: int) -> None:
        """Makes room for at least that many positions and keeps the content.

        Untouched memory costs nothing.
        """
        if positions > self.capacity:
            self._allocate_buffers(positions, self.state(len(self.tokens)))

    def restore(self, tokens: Sequence[int], state: Mapping[str, Floats]) -> None:
        """Replaces the content with a copy of another cache's tokens and state."""
        self._allocate_buffers(len(tokens), state)
        self.tokens = list(tokens)
        self._peak = max(self._peak, len(tokens))

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds the tokens of a step, whose keys and values are in the bound buffers."""
        self.tokens.extend(tokens)
        self._peak = max(self._peak, len(self.tokens))

    def drop_logits(self) -> None:
        """Frees the last step's logits.

        They take half a megabyte per position with a large vocabulary.
        """
        self.logits: NDArray[np.float32] = np.empty((1, 0, self._entry.vocab_size), np.float32)
        self._rows = self.logits  # the memory that they use: with speculation, the number of positions varies

    def rewind(self, length: int) -> None:
        """Drops all but the first `length` tokens."""
        del self.tokens[length:]

    def _fit_logits(self, keep: int) -> None:
        """Makes room for the logits of `keep` positions.

        Reuses the memory if it is large enough, but not too large.
        """
        if self.logits.shape[1] != keep:
            if not keep <= self._rows.shape[1] <= _KEPT_ROWS:
                self._rows = np.empty((1, keep, self._entry.vocab_size), np.float32)
            self.logits = self._rows[:, :keep]

    def _allocate(self, shape: tuple[int, ...]) -> list[Floats]:
        """Allocates one array per layer."""
        try:
            return [np.zeros(shape, self._float_type) for _ in range(self._entry.layers)]
        except MemoryError as error:
            raise ResourceError("no memory for a larger KV cache; use a shorter prompt or fewer tokens") from error


def count_position_bytes(entry: ModelEntry, float_type: np.dtype[Any]) -> int:
    """Counts the bytes of one position's keys and values in all layers."""
    return 2 * entry.layers * entry.kv_heads * entry.head_size * float_type.itemsize


def grow_capacity(capacity: int, positions: int, context_length: int) -> int:
    """Doubles a capacity until that many positions fit, up to the context."""
    capacity = max(_SMALLEST, capacity)
    while capacity < positions:
        capacity *= 2
    return min(capacity, context_length)


def shared_prefix(first: Sequence[object], second: Sequence[object]) -> int:
    """Returns the length of the longest common prefix of two sequences."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length
