"""The order of waiting requests: those of the current key may go first, within a bound on waiting.

Requests of one key share steps, so they run together; a key is a variant, or a live base with all its mixes. Others wait until
those have ended. Each time a request goes before one that has waited longer, the latter is passed. Once the request that has
waited longest was passed `patience` times, no other begins before it. So a request waits for those that came before it and for at
most `patience` others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence


class Waiting(Protocol):
    """A waiting request. key: requests of one key share steps. passed: how many later requests went before it."""

    key: str
    passed: int


R = TypeVar("R", bound=Waiting)


def choose_next(waiting: Sequence[Waiting], current: str | None, patience: int, *, running: int = 0) -> int | None:
    """Returns the index of the request to begin next, or None if all have to wait until one that runs has ended.

    waiting: in the order of arrival. current: the key that ran last. running: requests that run now, all of that key.
    """
    if not waiting:
        return None
    impatient = waiting[0].passed >= patience
    if impatient and (not running or waiting[0].key == current):
        return 0
    same = None if impatient else next((index for index, request in enumerate(waiting) if request.key == current), None)
    return 0 if same is None and not running else same


def take_next(waiting: list[R], current: str | None, patience: int, *, running: int = 0) -> R | None:
    """Removes the request to begin next and returns it. Those that waited longer count that they were passed."""
    chosen = choose_next(waiting, current, patience, running=running)
    if chosen is None:
        return None
    for request in waiting[:chosen]:
        request.passed += 1
    return waiting.pop(chosen)
