"""How a request ends before its time: by a call from any thread, or by the clock."""

from __future__ import annotations

import time


class InterruptedGeneration(Exception):  # noqa: N818  (not an error: the text so far is the answer)
    """Ends the step loop between two steps; reason is the generation's finish_reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Interruption:
    """Whether a request should end. timeout: seconds from now; None for none."""

    def __init__(self, timeout: float | None = None) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._cancelled = False

    def cancel(self) -> None:
        """Ends the request before its next step; safe from any thread."""
        self._cancelled = True

    def check(self) -> None:
        """Raises InterruptedGeneration once it is time to end."""
        if self._cancelled:
            raise InterruptedGeneration("cancelled")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise InterruptedGeneration("timeout")
