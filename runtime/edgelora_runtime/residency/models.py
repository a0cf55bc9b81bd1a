"""Loaded models under a budget of bytes.

Each is loaded once, when first needed, and the least recently used goes first.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from edgelora_runtime.session.model import Model

# Private bytes of a session per byte of its blobs (measured: docs/log.md): with onnxruntime's packed copy in memory, and with
# weights that are a mapped file.
_PACKED, _MAPPED = 1.25, 0.06


@dataclass(frozen=True)
class MemoryUsage:
    """The memory of loaded graphs, in bytes.

    graphs: their files, least recently used first. mapped: the blobs of all graphs, each counted once. shared: the blobs that two
    or more graphs map. private: what the graphs hold besides mapped blobs, mainly packed copies. live: the tensors of live
    adapters and the LoRA inputs made from them. kv_caches: keys and values that no request uses at the moment.
    """

    graphs: tuple[str, ...]
    mapped: int
    shared: int
    private: int
    live: int
    kv_caches: int


class LoadedModels:
    """Loaded models by graph.

    load: makes a model of a graph. blobs: for each graph, the bytes of its blobs. stages: for each graph, the bytes of weights
    that its stages pack. Stages of one name are shared. budget: bytes of MemoryUsage.private, or None for no limit. is_mapped:
    whether the weights that a stage reads are mapped, or would be if it were open (Loader). A requested model is loaded even if
    it exceeds the budget by itself. A model that was evicted while a stream runs it counts until the stream ends.
    """

    def __init__(
        self,
        load: Callable[[str], Model],
        blobs: Mapping[str, Mapping[str, int]],
        stages: Mapping[str, Mapping[str, int]],
        *,
        budget: int | None,
        is_mapped: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._load = load
        self._blobs = blobs
        self._stages = stages
        self._budget = budget
        self._is_mapped = is_mapped
        self._lock = threading.Lock()
        self._models: OrderedDict[str, Future[Model]] = OrderedDict()
        self._leaving: dict[weakref.ref[Model], str] = {}
        self._pins: Counter[str] = Counter()

    def get(self, graph: str) -> tuple[Model, bool]:
        """Returns a graph's model, and whether it had to be loaded.

        A caller that asks while it loads waits for it.
        """
        with self._lock:
            found = self._models.get(graph)
            if found is None:
                self._make_room(graph)
                found = self._models[graph] = Future()
                mine = True
            else:
                self._models.move_to_end(graph)
                mine = False
        if not mine:
            return found.result(), False
        try:
            model = self._load(graph)
        except BaseException as error:
            with self._lock:
                if self._models.get(graph) is found:
                    del self._models[graph]
            found.set_exception(error)
            raise
        found.set_result(model)
        return model, True

    def pin(self, graph: str) -> None:
        """Keeps a graph loaded, once it is, until an equal number of calls to unpin()."""
        with self._lock:
            self._pins[graph] += 1

    def unpin(self, graph: str) -> None:
        with self._lock:
            self._pins[graph] -= 1
            self._pins += Counter()  # drops counts of zero

    def clear(self) -> None:
        """Frees all models, also pinned ones."""
        with self._lock:
            self._models.clear()
            self._leaving.clear()
            self._pins.clear()

    def measure(self, live: int, kv_caches: int) -> MemoryUsage:
        """Measures the memory in use now. live, kv_caches: as counted by their owners."""
        with self._lock:
            graphs = tuple(self._models)
            counts: Counter[str] = Counter()
            sizes: dict[str, int] = {}
            for graph in graphs:
                blobs = self._blobs[graph]
                counts.update(blobs.keys())
                sizes |= blobs
            shared = sum(size for name, size in sizes.items() if counts[name] > 1)
            return MemoryUsage(graphs, sum(sizes.values()), shared, self._held(), live, kv_caches)

    def _make_room(self, graph: str) -> None:
        """Evicts models until the graph fits or only pinned ones are left."""
        if self._budget is None:
            return
        for other in self._evictable():
            if self._held(graph) <= self._budget:
                return
            model = self._models.pop(other).result()
            self._leaving[weakref.ref(model, self._forget)] = other
            del model

    def _evictable(self) -> Iterable[str]:
        """Returns the graphs that may be evicted, least recently used first.

        Pinned ones and those still loading may not.
        """
        return [name for name, future in self._models.items() if future.done() and name not in self._pins]

    def _held(self, *more: str) -> int:
        """Returns the private bytes of all loaded stages, together with those of more graphs."""
        held = {
            stage: size
            for graph in (*self._models, *list(self._leaving.values()), *more)
            for stage, size in self._stages[graph].items()
        }
        return sum(int(size * (_MAPPED if self._is_mapped(stage) else _PACKED)) for stage, size in held.items())

    def _forget(self, reference: weakref.ref[Model]) -> None:
        """Removes a freed model from the count.

        Called at any moment and in any thread, also one that holds the lock.
        """
        self._leaving.pop(reference, None)
