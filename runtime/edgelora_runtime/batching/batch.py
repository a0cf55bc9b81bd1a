"""A batch: requests of one model that share their steps of decoding, whichever threads they run in.

Each thread brings its text's newest token and waits for the logits. The first one that finds nobody computing leads: it waits
for the others of the last step to come back, computes one step for all that are there, and wakes them. So no thread exists
besides the callers' own, and a request that is not read holds up nobody.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from edgelora_runtime.batching.mix_pool import MixPool
from edgelora_runtime.batching.neighbours import close_gap, make_room
from edgelora_runtime.batching.slots import Slots
from edgelora_runtime.session.factors import PACKED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from edgelora_runtime.batching.room import Room
    from edgelora_runtime.session.factors import LoraInputs
    from edgelora_runtime.session.in_place_cache import InPlaceCache
    from edgelora_runtime.session.model import Model
    from edgelora_runtime.session.row_steps import RowSteps

    Floats = NDArray[np.float32]

_LEAST_GRACE, _MOST_GRACE = 0.002, 0.05  # seconds that a step waits for those of the last one; between them, as long as a step
_MOST_MISSED = 4  # steps without a request's token before it loses its slot


class Row:
    """A request's place in a batch.

    cache: its own, which holds its text whenever it has no slot. positions: the most that its text takes. length: positions that
    its slot holds. saved: those that its own cache holds as well. token: what the next step reads, None if it brought none yet.
    logits, error: what the last step gave. leads: it computes the next step. missed: steps since it brought a token.
    """

    def __init__(self, cache: InPlaceCache, live: LoraInputs | None, positions: int) -> None:
        self.cache = cache
        self.live = live
        self.positions = positions
        self.length = self.saved = 0
        self.slot: int | None = None
        self.token: int | None = None
        self.logits: Floats | None = None
        self.error: BaseException | None = None
        self.leads = False
        self.missed = 0
        self.gate = threading.Lock()  # released when the step is done, or to lead the next one
        self.gate.acquire()


class Batch:
    """Rows that share the steps of a model.

    room: the slots and bytes that rows may take. live: the LoRA inputs of all rows, if a step takes only one mix. readers: the
    requests that may bring a row. steps, rows_read: how many there were.
    """

    def __init__(self, model: Model, room: Room, live: LoraInputs | None = None) -> None:
        self.readers = self.steps = self.rows_read = 0
        self._model = model
        self._live: Mapping[str, NDArray[Any]] = live or {}
        self._mixes = MixPool(room.slots) if model.lora_type == PACKED and live is None else None
        self._room = room
        self._slots = Slots(model.entry, model.float_type, room.slots)
        self._row_steps: RowSteps | None = None
        self._lock = threading.Lock()  # of all that follows; the slots' content belongs to whoever holds the model's step lock
        self._back = threading.Condition(self._lock)
        self._rows: list[Row] = []  # by slot; those of one mix beside each other
        self._missing: set[Row] = set()  # rows of the last step that have not come back
        self._leading = False
        self._seconds = 0.0  # of the last step

    def read(self, row: Row, token: int) -> Floats | None:
        """Reads a row's next token in a step with those of other rows. Returns the logits (V,) after it.

        Returns None if the row has no slot and none is free. Nothing overwrites the logits.
        """
        try:
            while not self._bring(row, token):
                if not self._join(row):
                    return None
            if not row.leads:
                row.gate.acquire()
            if row.leads:
                self._lead(row)
        except BaseException:  # an interrupt: the others must not wait for this row
            with self._lock:
                row.token = None
                self._hand_over(row)
            raise
        if row.error is not None:
            error, row.error = row.error, None
            raise error
        logits, row.logits = row.logits, None
        return logits

    def leave(self, row: Row) -> None:
        """Takes a row's slot back, if it has one. Its cache then holds what the slot held."""
        with self._lock:
            self._expect_no_longer(row)
        with self._model.hold_step_lock():
            self._remove(row)

    def _bring(self, row: Row, token: int) -> bool:
        """Brings a row's token for the next step, which the row leads if nobody does. Returns False if it has no slot."""
        with self._lock:
            if row.slot is None:
                return False
            row.token = token
            self._expect_no_longer(row)
            row.leads = not self._leading
            self._leading = True
            return True

    def _join(self, row: Row) -> bool:
        """Gives a row a slot with what its cache holds. Returns False if there is no room."""
        size = row.positions * self._slots.position_bytes
        if not self._room.take(size):
            return False
        try:
            with self._model.hold_step_lock():
                row.length = len(row.cache.tokens)
                self._slots.reserve(row.length + 1, len(self._rows))
                slot, moves = make_room([id(each.live) for each in self._rows], id(row.live))
                rows = self._move([*self._rows, row], moves)
                self._slots.copy_in(slot, row.cache, row.length)
                with self._lock:
                    rows[slot] = row
                    self._rows = rows
                    row.saved, row.slot, row.missed = row.length, slot, 0
        except BaseException:
            self._room.give(size)
            raise
        return True

    def _lead(self, leader: Row) -> None:
        """Computes a step for all rows that have brought a token, and wakes them."""
        with self._lock:
            grace = min(max(self._seconds, _LEAST_GRACE), _MOST_GRACE)
            self._back.wait_for(lambda: not self._missing, grace)
        with self._model.hold_step_lock():
            with self._lock:
                self._missing.clear()
                for row in self._rows:
                    row.missed = 0 if row.token is not None else row.missed + 1
                gone = [row for row in self._rows if row.missed > _MOST_MISSED]
            for row in gone:
                self._remove(row)
            with self._lock:
                rows = list(self._rows)
                ready = [row for row in rows if row.token is not None]
            error: Exception | None = None
            found: Floats | None = None
            try:
                found = self._compute(rows)
            except Exception as failure:
                error = self._model.explain(failure)
            with self._lock:
                for index, row in enumerate(rows):
                    if row in ready:
                        row.token, row.error = None, error
                        if found is not None:
                            row.logits = found[index]
                            row.length += 1
                self._missing = set(ready)
                self.steps += 1
                self.rows_read += len(ready)
                self._hand_over(leader)
        for row in ready:
            if row is not leader:
                row.gate.release()

    def _compute(self, rows: list[Row]) -> Floats:
        """Reads the rows' tokens. One without a token reads an arbitrary one, whose place in the slot its next one takes."""
        started = time.perf_counter()
        self._slots.reserve(max(row.length for row in rows) + 1, len(rows))
        live = self._live
        if self._mixes is not None:
            live = self._mixes.combine([row.live or {} for row in rows])
        tokens = [row.token or 0 for row in rows]
        if self._row_steps is None:
            self._row_steps = self._model.open_rows()
        logits = self._row_steps.run(tokens, [row.length for row in rows], self._slots.buffers, live)
        self._seconds = time.perf_counter() - started
        return logits

    def _remove(self, row: Row) -> None:
        """Saves a row's text to its cache, unless it has just come back, and fills its slot.

        The caller holds the step lock, without which no slot changes.
        """
        with self._lock:
            slot = row.slot
            if slot is None or row.token is not None:
                return
            row.slot = None  # from now on it has to join again, which waits for the step lock
        self._slots.copy_out(slot, row.cache, row.saved, row.length)
        rows = self._move(list(self._rows), close_gap([id(each.live) for each in self._rows], slot))
        with self._lock:
            self._rows = rows[:-1]
        self._room.give(row.positions * self._slots.position_bytes)
        if not self._rows:
            self._slots.clear()
            if self._mixes is not None:
                self._mixes.clear()

    def _move(self, rows: list[Row], moves: Sequence[tuple[int, int]]) -> list[Row]:
        """Moves rows to other slots, each of which is free when its turn comes."""
        for start, to in moves:
            row = rows[to] = rows[start]
            self._slots.move(start, to, row.length)
            row.slot = to
        return rows

    def _expect_no_longer(self, row: Row) -> None:
        self._missing.discard(row)
        if not self._missing:
            self._back.notify_all()

    def _hand_over(self, leader: Row) -> None:
        """Lets another row that has brought a token compute the next step. The caller holds the lock."""
        if not leader.leads:
            return
        leader.leads = False
        late = next((row for row in self._rows if row.token is not None), None)
        self._leading = late is not None
        if late is not None:
            late.leads = True
            late.gate.release()
