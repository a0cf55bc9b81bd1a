"""The room of a runtime's batches: how many texts may share steps, and the bytes that they may take."""

from __future__ import annotations

import threading


class Room:
    """The slots and bytes that all batches share. Safe to call from many threads.

    slots: the most texts. budget: bytes of their keys and values, or None for no limit.
    """

    def __init__(self, slots: int, budget: int | None) -> None:
        self.slots = slots
        self._budget = budget
        self._lock = threading.Lock()
        self._taken = 0
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """The bytes that texts may come to need."""
        return self._bytes

    def take(self, size: int) -> bool:
        """Takes a slot and that many bytes. Returns False if there is no room for both."""
        with self._lock:
            if self._taken >= self.slots or (self._budget is not None and self._bytes + size > self._budget):
                return False
            self._taken += 1
            self._bytes += size
            return True

    def give(self, size: int) -> None:
        """Gives a slot and that many bytes back."""
        with self._lock:
            self._taken -= 1
            self._bytes -= size
