"""Which graphs are loaded: lazily, once for all who ask, least recently used out first, under a budget of bytes."""

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

# Bytes of its own that a session holds over those of the blobs that it was made from (measured: docs/log.md): onnxruntime's
# packed copy, or what is left where that is a mapped file.
_PACKED, _MAPPED = 1.25, 0.06


@dataclass(frozen=True)
class Usage:
    """What loaded graphs hold, in bytes.

    graphs: their files, least recently used first. mapped: of the blobs of them all, each counted once. shared: of those that
    two or more of them map. private: of what each has of its own, packed copies above all. live: of factors of live adapters and
    of LoRA inputs made from them. kv_caches: of keys and values that no request uses now.
    """

    graphs: tuple[str, ...]
    mapped: int
    shared: int
    private: int
    live: int
    kv_caches: int


class Residency:
    """Loaded models by graph.

    load: makes a model of a graph. blobs: of each graph its blobs with their bytes. stages: of each graph its stages with the
    bytes of weights that they pack; graphs share stages of one name. budget: bytes of Usage.private; None for no limit.
    is_mapped: whether the weights that a stage reads are mapped, or would be (Loader). What is asked for is loaded even where
    it alone is over the budget. A model that a stream still runs counts until the stream lets go of it.
    """

    def __init__(
        self,
        load: Callable[[str], Model],
        blobs: Mapping[str, Mapping[str, int]],
        stages: Mapping[str, Mapping[str, int]],
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
        """A graph's model, and whether it had to be loaded; one who asks while it loads waits for it."""
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
        """Keeps a graph loaded, once it is, until it was unpinned as often as pinned."""
        with self._lock:
            self._pins[graph] += 1

    def unpin(self, graph: str) -> None:
        with self._lock:
            self._pins[graph] -= 1
            self._pins += Counter()  # drops what is at zero

    def clear(self) -> None:
        """Lets go of all, pinned ones too."""
        with self._lock:
            self._models.clear()
            self._leaving.clear()
            self._pins.clear()

    def measure(self, live: int, kv_caches: int) -> Usage:
        """What is held now, beside what is counted elsewhere."""
        with self._lock:
            graphs = tuple(self._models)
            counts: Counter[str] = Counter()
            sizes: dict[str, int] = {}
            for graph in graphs:
                blobs = self._blobs[graph]
                counts.update(blobs.keys())
                sizes |= blobs
            shared = sum(size for name, size in sizes.items() if counts[name] > 1)
            return Usage(graphs, sum(sizes.values()), shared, self._held(), live, kv_caches)

    def _make_room(self, graph: str) -> None:
        """Evicts until the graph fits, or only what is pinned is left."""
        if self._budget is None:
            return
        for other in self._evictable():
            if self._held(graph) <= self._budget:
                return
            model = self._models.pop(other).result()
            self._leaving[weakref.ref(model, self._forget)] = other
            del model

    def _evictable(self) -> Iterable[str]:
        """Least recently used first; not what is pinned or still loads."""
        return [name for name, future in self._models.items() if future.done() and name not in self._pins]

    def _held(self, *more: str) -> int:
        """Bytes of all stages that are loaded, or that would be with more graphs."""
        held = {
            stage: size
            for graph in (*self._models, *list(self._leaving.values()), *more)
            for stage, size in self._stages[graph].items()
        }
        return sum(int(size * (_MAPPED if self._is_mapped(stage) else _PACKED)) for stage, size in held.items())

    def _forget(self, reference: weakref.ref[Model]) -> None:
        """A model was freed; may run at any moment, in any thread, also one that holds the lock."""
        self._leaving.pop(reference, None)
