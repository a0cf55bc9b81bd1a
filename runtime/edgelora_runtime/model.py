"""One onnxruntime session and the KV caches that it reads and writes in place."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from edgelora_runtime.errors import IntegrityError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora_runtime.manifest import ModelEntry

    Floats = NDArray[np.float32]

PREFILL_CHUNK = 512  # tokens per step of a long prompt: bounds the memory of activations
_SMALLEST_CACHE = 256  # positions; a cache doubles from here as it fills
_ERRORS_ONLY = 3  # onnxruntime's severity: its warnings about unused initializers are not news to a user


@dataclass
class Cache:
    """Keys and values of the tokens that one variant has read.

    keys, values: per layer float32 (1, kv_heads, capacity, head_size). tokens: what the first len(tokens) positions hold.
    logits: float32 (1, kept, V), what the last step wrote; here and not in the model, since a cache has one owner.
    """

    keys: list[Floats] = field(default_factory=list)
    values: list[Floats] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logits: Floats = field(default_factory=lambda: np.empty((1, 0, 0), np.float32))

    @property
    def capacity(self) -> int:
        """Positions that fit, in tokens."""
        return self.keys[0].shape[2] if self.keys else 0

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens; the positions behind them are overwritten later."""
        del self.tokens[length:]

    def reserve(self, positions: int, model: ModelEntry) -> None:
        """Grows to hold at least `positions`, keeping what is there."""
        if positions <= self.capacity:
            return
        capacity = max(_SMALLEST_CACHE, self.capacity)
        while capacity < positions:
            capacity *= 2
        shape = (1, model.kv_heads, min(capacity, model.context_length), model.head_size)
        used = len(self.tokens)
        try:
            keys, values = ([np.zeros(shape, np.float32) for _ in range(model.layers)] for _ in range(2))
        except MemoryError as error:
            raise ResourceError(
                f"no memory for a KV cache of {shape[2]} positions; use a shorter prompt or fewer tokens"
            ) from error
        for new, old in zip((*keys, *values), (*self.keys, *self.values), strict=False):
            new[:, :, :used] = old[:, :, :used]
        self.keys, self.values = keys, values

    def resize_logits(self, kept: int, model: ModelEntry) -> None:
        """Makes room for the logits of `kept` positions."""
        if self.logits.shape[1:] != (kept, model.vocab_size):
            self.logits = np.empty((1, kept, model.vocab_size), np.float32)


def shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share from their start."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


class Model:
    """A graph that is ready to run. One step at a time; any number of caches and of live adapters."""

    def __init__(self, graph: Path, entry: ModelEntry, *, threads: int | None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise IntegrityError(f"onnxruntime refuses {graph.name}: {str(error).splitlines()[0][:300]}") from error
        if wrong := _compare_shapes(self._session, entry):
            raise IntegrityError(f"{graph.name} is not what the manifest says: {'; '.join(wrong[:4])}")
        self._entry = entry
        self._binding = self._session.io_binding()
        self._lock = threading.Lock()
        self._bound_keys: list[Floats] | None = None  # a cache that grows gets new lists and arrays
        self._bound_logits: Floats | None = None
        self._bound_live: Mapping[str, Floats] | None = None
        self._keep = np.zeros(1, np.int64)
        self._ones = np.ones((1, 0), np.int64)
        self._binding.bind_ortvalue_input("logits_to_keep", ort.OrtValue.ortvalue_from_numpy(self._keep))

    def read(self, cache: Cache, tokens: Sequence[int], *, live: Mapping[str, Floats] | None = None, keep: int = 1) -> Floats:
        """Appends tokens to the cache; returns the logits (keep, V) of the last `keep` of them.

        live: the LoRA inputs to run with; pass the same mapping again to save the binding. The array that is returned is
        the cache's own: the next call with this cache overwrites it. The caller sees to it that the tokens fit in the context.
        """
        with self._lock:
            start = 0
            while True:
                chunk = tokens[start : start + PREFILL_CHUNK]
                start += len(chunk)
                ended = start == len(tokens)
                try:
                    logits = self._step(cache, chunk, live, keep if ended else 1)
                except RuntimeError as error:  # onnxruntime's, from binding or running
                    raise IntegrityError(f"onnxruntime cannot run the graph: {str(error).splitlines()[0][:300]}") from error
                if ended:
                    return logits

    def reserve(self, cache: Cache, positions: int) -> None:
        """Makes room for that many positions at once, so that no step has to; untouched memory costs nothing."""
        cache.reserve(min(positions, self._entry.context_length), self._entry)

    def _step(self, cache: Cache, tokens: Sequence[int], live: Mapping[str, Floats] | None, keep: int) -> Floats:
        total = len(cache.tokens) + len(tokens)
        cache.reserve(total, self._entry)
        cache.resize_logits(keep, self._entry)
        if cache.keys is not self._bound_keys or cache.logits is not self._bound_logits:
            self._bind_cache(cache)
        if live is not self._bound_live:
            self._bind_live(live or {})
            self._bound_live = live
        if self._ones.shape[1] < cache.capacity:
            self._ones = np.ones((1, cache.capacity), np.int64)
        ids = np.array([tokens], np.int64)
        _bind_input(self._binding, "input_ids", ids, ids.shape)
        _bind_input(self._binding, "attention_mask", self._ones, (1, total))
        self._session.run_with_iobinding(self._binding)
        cache.tokens.extend(tokens)
        logits: Floats = cache.logits[0]
        return logits

    def _bind_cache(self, cache: Cache) -> None:
        """Binds each buffer as past and as present: GroupQueryAttention then writes in place."""
        for index, pair in enumerate(zip(cache.keys, cache.values, strict=True)):
            for kind, buffer in zip(("key", "value"), pair, strict=True):
                _bind_input(self._binding, f"past_key_values.{index}.{kind}", buffer, buffer.shape)
                _bind_output(self._binding, f"present.{index}.{kind}", buffer)
        _bind_output(self._binding, "logits", cache.logits)
        self._keep[0] = cache.logits.shape[1]
        self._bound_keys, self._bound_logits = cache.keys, cache.logits

    def _bind_live(self, live: Mapping[str, Floats]) -> None:
        for name, array in live.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))


def _compare_shapes(session: ort.InferenceSession, entry: ModelEntry) -> list[str]:
    """Which of the sizes that the caches and logits are made by differ from the graph's."""
    shape = [1, entry.kv_heads, entry.head_size]  # the third axis, positions, varies
    layers = min(entry.layers, len(session.get_inputs()))  # a manifest may claim any number
    wanted: dict[str, list[int]] = {"logits": [1, entry.vocab_size]}
    for pair in ("past_key_values", "present"):
        wanted |= {f"{pair}.{index}.{kind}": shape for index in range(layers) for kind in ("key", "value")}
    found = {
        value.name: [size for size in value.shape if isinstance(size, int)]
        for value in (*session.get_inputs(), *session.get_outputs())
        if value.name not in ("input_ids", "attention_mask")
    }
    return [
        f"{name} has sizes {found.get(name)}, not {wanted.get(name)}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]


def _bind_input(binding: ort.IOBinding, name: str, array: NDArray[np.generic], shape: tuple[int, ...]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype, shape, array.ctypes.data)


def _bind_output(binding: ort.IOBinding, name: str, array: NDArray[np.generic]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
