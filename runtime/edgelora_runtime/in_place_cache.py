"""The KV cache of graphs that write in place: one buffer is past and present, and each step fills its next positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelora_runtime.cache import KVCache

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgelora_runtime.binding import Binding
    from edgelora_runtime.manifest import ModelEntry

    Floats = NDArray[np.float32]


class InPlaceCache(KVCache):
    """Buffers float32 (1, kv_heads, capacity, head_size); positions behind the tokens are overwritten when their turn comes."""

    def __init__(self, entry: ModelEntry) -> None:
        super().__init__(entry)
        self._keys: list[Floats] = []
        self._values: list[Floats] = []
        self._buffers = object()  # another one whenever a buffer is: what is bound then has to be bound again

    @property
    def capacity(self) -> int:
        return self._keys[0].shape[2] if self._keys else 0

    def reserve(self, positions: int) -> None:
        if positions <= self.capacity:
            return
        shape = (1, self._entry.kv_heads, self._next_capacity(positions), self._entry.head_size)
        used = len(self.tokens)
        keys, values = self._allocate(shape), self._allocate(shape)
        for new, old in zip((*keys, *values), (*self._keys, *self._values), strict=False):
            new[:, :, :used] = old[:, :, :used]
        self._keys, self._values, self._buffers = keys, values, object()

    def bind(self, binding: Binding, count: int, keep: int) -> None:
        self.reserve(len(self.tokens) + count)
        if self.logits.shape[1] != keep:
            self.logits, self._buffers = np.empty((1, keep, self._entry.vocab_size), np.float32), object()
        if binding.holds is self._buffers:
            return
        for index, pair in enumerate(zip(self._keys, self._values, strict=True)):
            for kind, buffer in zip(("key", "value"), pair, strict=True):
                binding.input(f"past_key_values.{index}.{kind}", buffer)
                binding.output(f"present.{index}.{kind}", buffer)
        binding.output("logits", self.logits)
        binding.holds = self._buffers
