"""Cancellation of a request, by a call from any thread or at a deadline."""

from __future__ import annotations

import time


class GenerationCancelled(Exception):  # noqa: N818  (not an error: the text so far is the answer)
    """A signal that ends the decode loop between two steps.

    reason: the generation's finish_reason, "cancelled" or "timeout".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Cancellation:
    """A request's signal to end. timeout: seconds from now, or None for no limit."""

    def __init__(self, timeout: float | None = None) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._cancelled = False

    def cancel(self) -> None:
        """Ends the request before its next step. Safe from any thread."""
        self._cancelled = True

    def check(self) -> None:
        """Raises GenerationCancelled if the request should end."""
        if self._cancelled:
            raise GenerationCancelled("cancelled")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise GenerationCancelled("timeout")
