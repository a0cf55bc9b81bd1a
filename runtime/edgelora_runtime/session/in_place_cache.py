"""The KV cache of graphs that write in place.

One buffer is both past and present, and each step fills its next positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from edgelora_runtime.errors import ResourceError
from edgelora_runtime.session.kv_cache import KVCache, grow_capacity

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from edgelora_runtime.bundle.manifest import ModelEntry
    from edgelora_runtime.session.binding import Binding
    from edgelora_runtime.session.kv_cache import Floats


class InPlaceCache(KVCache):
    """Buffers (1, kv_heads, capacity, head_size) that steps write in place.

    Later steps overwrite the positions after the tokens. memory: the device of the buffers, by onnxruntime's name.
    """

    def __init__(self, entry: ModelEntry, float_type: np.dtype[Any], memory: str = "cpu") -> None:
        super().__init__(entry, float_type)
        self._memory = memory
        self._buffers: dict[str, ort.OrtValue] = {}  # by {layer}.key and {layer}.value; new buffers come in a new dict
        self._capacity = 0

    @property
    def capacity(self) -> int:
        return self._capacity

    def state(self, length: int) -> dict[str, Floats]:
        return {name: buffer.numpy()[0, :, :length] for name, buffer in self._buffers.items()}

    def write(self, start: int, state: Mapping[str, Floats]) -> None:
        """Writes keys and values, named as in state(), to the positions from `start` on.

        The buffers must be in main memory.
        """
        stop = start + next(iter(state.values())).shape[1]
        if stop > self._capacity:
            self._allocate_buffers(stop, self.state(start))
        for name, buffer in self._buffers.items():
            buffer.numpy()[0, :, start:stop] = state[name]

    def bind(self, binding: Binding, count: int, keep: int) -> None:
        self.reserve(len(self.tokens) + count)
        self._fit_logits(keep)
        if binding.holds is not self._buffers:
            for name, buffer in self._buffers.items():
                binding.cache(f"past_key_values.{name}", f"present.{name}", buffer)
            binding.holds = self._buffers
        if binding.writes is not self.logits:
            binding.output("logits", self.logits)
            binding.writes = self.logits

    def _allocate_buffers(self, positions: int, state: Mapping[str, Floats]) -> None:
        capacity = grow_capacity(self.capacity, positions, self._entry.context_length)
        shape = (1, self._entry.kv_heads, capacity, self._entry.head_size)
        buffers = {}
        for kind in ("key", "value"):
            for index, array in enumerate(self._allocate(shape)):
                name = f"{index}.{kind}"
                if state:
                    array[0, :, : state[name].shape[1]] = state[name]
                buffers[name] = self._place(array)
        self._buffers, self._capacity = buffers, capacity

    def _place(self, array: Floats) -> ort.OrtValue:
        """Places an array on the cache's device.

        In main memory this is the array itself, elsewhere a copy.
        """
        try:
            return ort.OrtValue.ortvalue_from_numpy(array, self._memory, 0)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ResourceError(
                f"no memory on {self._memory} for a larger KV cache; use a shorter prompt or fewer tokens"
            ) from error
