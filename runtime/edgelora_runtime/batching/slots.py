"""Slots: the keys and values of texts that share steps, beside each other in one buffer for each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.errors import ResourceError
from edgelora_runtime.session.kv_cache import count_position_bytes, grow_capacity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgelora_runtime.bundle.manifest import ModelEntry
    from edgelora_runtime.session.in_place_cache import InPlaceCache

    Floats = NDArray[Any]  # float32, or float16 of a GPU's graphs


class Slots:
    """Buffers (slots, kv_heads, capacity, head_size), by {layer}.key and {layer}.value. New buffers come in a new dict.

    Memory that no step or copy has touched costs nothing. Not safe to call while a step runs.
    """

    def __init__(self, entry: ModelEntry, float_type: np.dtype[Any], count: int) -> None:
        self.buffers: dict[str, Floats] = {}
        self._entry = entry
        self._float_type = float_type
        self._count = count
        self._capacity = 0

    @property
    def position_bytes(self) -> int:
        """The bytes of one position's keys and values."""
        return count_position_bytes(self._entry, self._float_type)

    def reserve(self, positions: int, used: int) -> None:
        """Makes room for that many positions in each slot, and keeps the content of the first `used` slots."""
        if positions <= self._capacity:
            return
        capacity = grow_capacity(self._capacity, positions, self._entry.context_length)
        shape = (self._count, self._entry.kv_heads, capacity, self._entry.head_size)
        grown: dict[str, Floats] = {}
        try:
            for kind in ("key", "value"):
                for layer in range(self._entry.layers):
                    name = f"{layer}.{kind}"
                    grown[name] = np.zeros(shape, self._float_type)
                    if used:
                        grown[name][:used, :, : self._capacity] = self.buffers[name][:used]
        except MemoryError as error:
            raise ResourceError("no memory for the texts of several requests; set a smaller batch") from error
        self.buffers, self._capacity = grown, capacity

    def copy_in(self, slot: int, cache: InPlaceCache, length: int) -> None:
        """Copies the first `length` positions of a cache to a slot, which has room for them."""
        for name, state in cache.state(length).items():
            self.buffers[name][slot, :, :length] = state

    def copy_out(self, slot: int, cache: InPlaceCache, start: int, stop: int) -> None:
        """Copies positions start … stop - 1 of a slot to the same positions of a cache."""
        if start < stop:
            cache.write(start, {name: buffer[slot, :, start:stop] for name, buffer in self.buffers.items()})

    def move(self, slot: int, to: int, length: int) -> None:
        """Copies the first `length` positions of a slot to another."""
        for buffer in self.buffers.values():
            buffer[to, :, :length] = buffer[slot, :, :length]

    def clear(self) -> None:
        """Frees the buffers."""
        self.buffers, self._capacity = {}, 0
