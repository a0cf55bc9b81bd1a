"""A model: the sessions of a graph, and how they read tokens into a KV cache."""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.errors import IntegrityError
from edgelora_runtime.session.binding import Binding
from edgelora_runtime.session.factors import PACKED
from edgelora_runtime.session.fair_lock import StepLock
from edgelora_runtime.session.growing_cache import GrowingCache
from edgelora_runtime.session.in_place_cache import InPlaceCache
from edgelora_runtime.session.providers import CPU, explain_failure
from edgelora_runtime.session.row_steps import KEEP, RowSteps
from edgelora_runtime.session.stage import Stage, open_stage
from edgelora_runtime.session.step_costs import MAX_DRAFT_TOKENS, MIN_ROWS, StepCosts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import onnxruntime as ort
    from numpy.typing import NDArray

    from edgelora_runtime.bundle.manifest import ModelEntry
    from edgelora_runtime.session.factors import LoraInputs
    from edgelora_runtime.session.kernels import Kernels
    from edgelora_runtime.session.kv_cache import KVCache
    from edgelora_runtime.session.providers import Provider

    Floats = NDArray[np.float32]
    Values = tuple[ort.NodeArg, ...]

STATES = "hidden_states"  # optional output: the states after the final norm
_STATES_CHUNK = 64  # tokens per step of an embedding: bounds the memory of the logits, which the graph computes as well
PREFILL_CHUNK = 512  # tokens per step of a long prompt: bounds the memory of activations
SHARED_CHUNK = 128  # the same while other requests are answered: bounds the time between two of their tokens
# Kernels may compute a few rows in another order of additions than many. A chunk leaves no fewer than these, so that its size
# changes no bit of an answer.
_FEW_ROWS = 16
_FLOAT_TYPES: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}


class Model:
    """A graph that is ready to run, as one stage or several.

    It runs one step at a time, for any number of caches and live mixes.

    entry: the sizes of the model. step_lock: models that share it run one step at a time between them, since they compete for
    the same cores. opened: bytes of weights that had to be opened for it. float_type: of its KV cache, float32 or float16.
    Logits are float32. lora_type: of its LoRA inputs: float_type or PACKED. has_states: whether it supports read_states().
    takes_rows: whether a step can read texts of several requests. costs: seconds of its steps over few tokens.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        entry: ModelEntry,
        *,
        name: str,
        provider: Provider = CPU,
        step_lock: StepLock | None = None,
        opened: int = 0,
    ) -> None:
        sessions = [stage.session for stage in stages]
        inputs, outputs = _read_inputs_and_outputs(sessions, entry, name)
        if wrong := _compare_shapes(inputs + outputs, entry):
            raise IntegrityError(f"{name} differs from the manifest: {'; '.join(wrong[:4])}")
        self.opened = opened
        self.float_type = _read_float_type(inputs + outputs, name)
        self.lora_type = PACKED if any(stage.takes_packed for stage in stages) else self.float_type
        self.has_states = any(value.name == STATES for value in outputs)
        ids = next(value for value in inputs if value.name == "input_ids")
        self.takes_rows = isinstance(ids.shape[0], str) and entry.cache == "in_place" and provider.memory == CPU.memory
        self.costs = StepCosts()
        self._stages = stages  # a shared stage stays open as long as some model refers to it
        self._sessions = sessions
        self.entry = entry
        self._provider = provider
        self.step_lock = step_lock or StepLock()
        self._steps = _Steps(sessions)

    @classmethod
    def open(
        cls, graph: Path, entry: ModelEntry, *, threads: int | None, provider: Provider = CPU, kernels: Kernels | None = None
    ) -> Model:
        """Opens a whole graph as a model that shares nothing."""
        stage = open_stage(graph, threads=threads, provider=provider, kernels=kernels)
        return cls([stage], entry, name=graph.name, provider=provider)

    def new_cache(self) -> KVCache:
        """Creates an empty cache of the kind that the graph writes."""
        return new_cache(self.entry, self.float_type, self._provider.memory)

    def read(
        self,
        cache: KVCache,
        tokens: Sequence[int],
        *,
        live: LoraInputs | None = None,
        keep: int = 1,
        check: Callable[[], None] | None = None,
    ) -> Floats:
        """Appends tokens to the cache and returns the logits (keep, V) of the last `keep` of them.

        live: the LoRA inputs to run with. Passing the same mapping again saves binding it. check: called before each chunk of a
        long prompt. It may raise to end here, and the cache then holds the chunks so far. The returned array belongs to the
        cache, and the next call with this cache overwrites it. The caller ensures that the tokens fit in the context.
        """
        start = 0
        while True:
            chunk = tokens[start : start + self._size_chunk(start, len(tokens), keep)]
            start += len(chunk)
            ended = start == len(tokens)
            with self.step_lock.prompts if len(chunk) > _FEW_ROWS else nullcontext(), self.hold_step_lock():
                if check is not None:
                    check()
                started = time.perf_counter()
                self._steps.run(cache, chunk, live, keep if ended else 1)
                if len(chunk) <= min(max(keep, MIN_ROWS), MAX_DRAFT_TOKENS + 1):  # a step of decoding
                    self.costs.note(len(chunk), time.perf_counter() - started)
            if ended:
                logits: Floats = cache.logits[0]
                return logits

    def _size_chunk(self, start: int, count: int, keep: int) -> int:
        """Returns the size of the chunk that begins at `start` of `count` tokens.

        The last chunk has all positions to keep. Small chunks divide the large ones.
        """
        left = count - start
        if PREFILL_CHUNK < left < PREFILL_CHUNK + keep:
            return left - keep
        if left <= keep:
            return left
        until = min(PREFILL_CHUNK - start % PREFILL_CHUNK, left)
        is_last = until == left
        if self.step_lock.requests < 2 or until <= SHARED_CHUNK + (max(keep, _FEW_ROWS) if is_last else 0):
            return until
        return SHARED_CHUNK

    def open_rows(self) -> RowSteps:
        """Opens steps that read a token of several texts each. Requires takes_rows."""
        return RowSteps(self._sessions, self.entry)

    def read_states(self, tokens: Sequence[int], *, live: LoraInputs | None = None) -> Iterator[Floats]:
        """Yields the states after the final norm, float32 (T, hidden_size), from an empty cache.

        Requires has_states. Each array has few positions, because the head runs as well.
        """
        steps, cache = _Steps(self._sessions), self.new_cache()
        self.reserve(cache, len(tokens))
        for start in range(0, len(tokens), _STATES_CHUNK):
            chunk = tokens[start : start + _STATES_CHUNK]
            states = np.empty((1, len(chunk), self.entry.hidden_size), self.float_type)
            with self.hold_step_lock():
                steps.run(cache, chunk, live, len(chunk), states)
            yield states[0].astype(np.float32, copy=False)

    def embed(self, tokens: Sequence[int], *, live: LoraInputs | None = None) -> Floats:
        """Returns the mean of the states of read_states(), float32 (hidden_size,), scaled to length 1. Requires has_states."""
        total = np.zeros(self.entry.hidden_size, np.float64)
        for states in self.read_states(tokens, live=live):
            total += states.sum(axis=0, dtype=np.float64)
        return (total / max(np.linalg.norm(total), np.finfo(np.float64).tiny)).astype(np.float32)

    def reserve(self, cache: KVCache, positions: int) -> None:
        """Makes room for that many positions at once, so that no step has to.

        Untouched memory costs nothing.
        """
        cache.reserve(min(positions, self.entry.context_length))

    @contextmanager
    def hold_step_lock(self) -> Iterator[None]:
        """Holds the lock for one step, and turns onnxruntime's errors into this package's."""
        with self.step_lock:
            try:
                yield
            except RuntimeError as error:
                raise self.explain(error) from error

    def explain(self, error: Exception) -> Exception:
        """Returns this package's error for one of onnxruntime's, when it binds or runs. Others stay as they are."""
        return explain_failure(self._provider, "run the graph", error) if isinstance(error, RuntimeError) else error


class _Steps:
    """A graph's steps. Each binds only what changed since the last one."""

    def __init__(self, sessions: Sequence[ort.InferenceSession]) -> None:
        self._binding = Binding(sessions)
        self._live: LoraInputs | None = None
        self._keep = np.zeros(1, np.int64)
        self._ones = np.ones((1, 0), np.int64)
        self._binding.optional_input(KEEP, self._keep)

    def run(
        self, cache: KVCache, tokens: Sequence[int], live: LoraInputs | None, keep: int, states: NDArray[Any] | None = None
    ) -> None:
        """Runs one step over tokens.

        The last `keep` get logits, and hidden states if an array (1, keep, hidden_size) is given.
        """
        total = len(cache.tokens) + len(tokens)
        cache.bind(self._binding, len(tokens), keep)
        if live is not self._live:
            for name, array in (live or {}).items():
                self._binding.optional_input(name, array)
            self._live = live
        if self._ones.shape[1] < total:
            self._ones = np.ones((1, cache.capacity), np.int64)
        if self._keep[0] != keep:
            self._keep[0] = keep
            self._binding.optional_input(KEEP, self._keep)  # a GPU has its own copy
        if states is not None:
            self._binding.output(STATES, states)
        ids = np.array([tokens], np.int64)
        self._binding.input("input_ids", ids)
        self._binding.input("attention_mask", self._ones, (1, total))
        self._binding.run(B=1, S=len(tokens), kept=keep)
        cache.extend(tokens)


def new_cache(entry: ModelEntry, float_type: np.dtype[Any], memory: str) -> KVCache:
    """Creates an empty cache of the kind that a manifest's graphs write.

    memory: its device, by onnxruntime's name.
    """
    return GrowingCache(entry, float_type) if entry.cache == "growing" else InPlaceCache(entry, float_type, memory)


def _read_inputs_and_outputs(sessions: Sequence[ort.InferenceSession], entry: ModelEntry, name: str) -> tuple[Values, Values]:
    """Returns the inputs and outputs of a chain of sessions.

    The values that pass from one to the next are left out.
    """
    inputs = [{value.name: value for value in session.get_inputs()} for session in sessions]
    outputs = [{value.name: value for value in session.get_outputs()} for session in sessions]
    crossing: set[str] = set()
    for place, written in enumerate(outputs):
        for reader, read in enumerate(inputs):
            handed = written.keys() & read.keys()
            fits = all(written[key].shape[1:] in (["S", entry.hidden_size], ["kept", entry.hidden_size]) for key in handed)
            if handed and not (reader == place + 1 and fits):
                raise IntegrityError(f"the stages of {name} do not fit together; export the bundle again")
            crossing |= handed
    outer = [{key: value for part in parts for key, value in part.items() if key not in crossing} for parts in (inputs, outputs)]
    return tuple(outer[0].values()), tuple(outer[1].values())


def _read_float_type(values: Values, name: str) -> np.dtype[Any]:
    """Returns the common type of all floating-point inputs and present outputs."""
    kinds = {value.type for value in values if value.type != "tensor(int64)" and value.name != "logits"}
    if len(kinds) != 1 or not _FLOAT_TYPES.keys() >= kinds:
        raise IntegrityError(f"{name} has a KV cache of {', '.join(sorted(kinds))}; it should be float32 or float16 throughout")
    return _FLOAT_TYPES[kinds.pop()]


def _compare_shapes(values: Values, entry: ModelEntry) -> list[str]:
    """Returns one message per input or output with other sizes than the manifest's.

    Caches, logits and states are allocated with the manifest's. The first axis, texts, is 1 or symbolic.
    """
    shape = [entry.kv_heads, entry.head_size]  # the third axis, positions, varies
    layers = min(entry.layers, len(values))  # a manifest can claim any number of layers
    wanted: dict[str, list[int]] = {"logits": [entry.vocab_size]}
    for pair in ("past_key_values", "present"):
        wanted |= {f"{pair}.{index}.{kind}": shape for index in range(layers) for kind in ("key", "value")}
    found = {
        value.name: [size for size in value.shape[value.shape[:1] == [1] :] if isinstance(size, int)]
        for value in values
        if value.name not in ("input_ids", "attention_mask")
    }
    if STATES in found:
        wanted[STATES] = [entry.hidden_size]
    return [
        f"{name} has sizes {found.get(name)}, not {wanted.get(name)}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
