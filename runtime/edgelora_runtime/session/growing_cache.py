"""The KV cache of graphs that write past and new positions into another tensor at each step.

That tensor holds both, concatenated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.session.kv_cache import KVCache, grow_capacity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgelora_runtime.bundle.manifest import ModelEntry
    from edgelora_runtime.session.binding import Binding
    from edgelora_runtime.session.kv_cache import Floats


class GrowingCache(KVCache):
    """Two sets of flat buffers (kv_heads * capacity * head_size), which swap after each step.

    A step reads one set and writes the other. The graph reads or writes the start of a buffer, viewed as (1, kv_heads, positions,
    head_size), so no step allocates.
    """

    _copies = 2

    def __init__(self, entry: ModelEntry, float_type: np.dtype[Any]) -> None:
        super().__init__(entry, float_type)
        self._past: list[Floats] = []  # keys of all layers, then values
        self._present: list[Floats] = []
        self._held = 0  # positions in the past buffers; tokens may be fewer after a rewind
        self._keys = [f"{index}.{kind}" for kind in ("key", "value") for index in range(entry.layers)]
        self._names = [(f"past_key_values.{name}", f"present.{name}") for name in self._keys]

    @property
    def capacity(self) -> int:
        return len(self._past[0]) // (self._entry.kv_heads * self._entry.head_size) if self._past else 0

    def state(self, length: int) -> dict[str, Floats]:
        return {name: self._view(buffer, self._held)[0, :, :length] for name, buffer in zip(self._keys, self._past, strict=False)}

    def bind(self, binding: Binding, count: int, keep: int) -> None:
        self.reserve(len(self.tokens) + count)
        self._cut()
        past, present = (self._shape(length) for length in (self._held, self._held + count))
        buffers = zip(self._past, self._present, strict=True)
        for (past_name, present_name), (read, written) in zip(self._names, buffers, strict=True):
            binding.input(past_name, read, past)
            binding.output(present_name, written, present)
        self._fit_logits(keep)
        binding.output("logits", self.logits)

    def extend(self, tokens: Sequence[int]) -> None:
        super().extend(tokens)
        self._past, self._present = self._present, self._past
        self._held = len(self.tokens)

    def _allocate_buffers(self, positions: int, state: Mapping[str, Floats]) -> None:
        shape = (
            self._entry.kv_heads * grow_capacity(self.capacity, positions, self._entry.context_length) * self._entry.head_size,
        )
        past, present = (self._allocate(shape) + self._allocate(shape) for _ in range(2))
        held = next(iter(state.values())).shape[1] if state else 0
        if held:
            for name, buffer in zip(self._keys, past, strict=True):
                self._view(buffer, held)[0] = state[name]
        self._past, self._present, self._held = past, present, held

    def _cut(self) -> None:
        """Drops the positions of tokens that rewind() removed.

        This moves the heads closer together, so it is a copy.
        """
        length = len(self.tokens)
        if length == self._held:
            return
        for old, new in zip(self._past, self._present, strict=True):
            self._view(new, length)[:] = self._view(old, self._held)[:, :, :length]
        self._past, self._present, self._held = self._present, self._past, length

    def _shape(self, positions: int) -> tuple[int, ...]:
        return (1, self._entry.kv_heads, positions, self._entry.head_size)

    def _view(self, buffer: Floats, positions: int) -> Floats:
        shape = self._shape(positions)
        return buffer[: int(np.prod(shape))].reshape(shape)
