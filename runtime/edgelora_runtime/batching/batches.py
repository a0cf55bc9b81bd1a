"""The batches of a runtime: one for each model whose requests can share steps."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgelora_runtime.batching.batch import Batch
from edgelora_runtime.batching.room import Room
from edgelora_runtime.session.factors import PACKED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgelora_runtime.session.factors import LoraInputs
    from edgelora_runtime.session.model import Model


class Batches:
    """Batches by model, each as long as a request may use it. Safe to call from many threads.

    With edgelora's kernels, all mixes of a live graph share one batch. With onnxruntime's, a step takes one mix, so each mix has
    a batch of its own. slots: the most requests that share steps. budget: bytes of their keys and values, or None for no limit.
    """

    def __init__(self, slots: int, budget: int | None) -> None:
        self._room = Room(slots, budget)
        self._lock = threading.Lock()
        self._open: dict[tuple[int, object], Batch] = {}  # by the identity of a model, which its readers keep alive, and the mix

    @property
    def slots(self) -> int:
        """The most requests that share steps."""
        return self._room.slots

    @property
    def bytes(self) -> int:
        """The bytes of keys and values that requests in batches may come to need."""
        return self._room.bytes

    @contextmanager
    def enter(self, model: Model, live: LoraInputs | None, mix: object) -> Iterator[Batch | None]:
        """Counts a request of a model while it runs, and gives it the batch that it may join. None if it can join none.

        mix: what live was made from.
        """
        model.step_lock.enter_request()
        try:
            if model.takes_rows and self._room.slots > 1:
                with self._enter_batch(model, live, mix) as batch:
                    yield batch
            else:
                yield None
        finally:
            model.step_lock.leave_request()

    @contextmanager
    def _enter_batch(self, model: Model, live: LoraInputs | None, mix: object) -> Iterator[Batch]:
        takes_many = model.lora_type == PACKED
        key = (id(model), None if takes_many else mix)
        with self._lock:
            batch = self._open.get(key)
            if batch is None:
                batch = self._open[key] = Batch(model, self._room, None if takes_many else live)
            batch.readers += 1
        try:
            yield batch
        finally:
            with self._lock:
                batch.readers -= 1
                if not batch.readers:
                    del self._open[key]
