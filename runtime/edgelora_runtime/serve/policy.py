"""The order of waiting requests: those of the current variant may go first, within a bound on waiting.

A switch costs time, so requests of one variant run together where that is fair. Each time a request goes before one that has
waited longer, the latter is passed. The request that has waited longest goes next as soon as it was passed `patience` times. No
request is passed more often than that, so it waits for those that came before it and for at most `patience` others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence


class Waiting(Protocol):
    """A waiting request. key: the variant or mix that it runs on. passed: how many later requests went before it."""

    key: str
    passed: int


R = TypeVar("R", bound=Waiting)


def choose_next(waiting: Sequence[Waiting], current: str | None, patience: int) -> int:
    """Returns the index of the request to run next.

    waiting: at least one, in the order of arrival. current: the key that ran last.
    """
    if waiting[0].passed >= patience:
        return 0
    return next((index for index, request in enumerate(waiting) if request.key == current), 0)


def take_next(waiting: list[R], current: str | None, patience: int) -> R:
    """Removes the request to run next and returns it. Those that waited longer count that they were passed."""
    chosen = choose_next(waiting, current, patience)
    for request in waiting[:chosen]:
        request.passed += 1
    return waiting.pop(chosen)
