"""The order of rows in a batch: those of one mix lie beside each other, so that a step reads the factors of each mix once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    Moves = list[tuple[int, int]]  # from a slot to a free one, in order


def make_room(mixes: Sequence[Hashable], mix: Hashable) -> tuple[int, Moves]:
    """Finds the slot for a new row, and the moves that free it: at most one for each other mix.

    Requires: `mixes` are those of the rows by slot, and equal ones lie beside each other.
    Ensures: with the moves done and the row in its slot they still do, and all slots up to the number of rows are taken.
    """
    free, moves = len(mixes), []
    if mix in mixes:
        for start in reversed(_find_starts(mixes)):
            if mixes[start] == mix:
                break
            moves.append((start, free))
            free = start
    return free, moves


def close_gap(mixes: Sequence[Hashable], slot: int) -> Moves:
    """Finds the moves after a row's end that fill its slot: at most one for its mix and one for each other.

    Requires: as make_room, the row included.
    Ensures: with the moves done, equal mixes lie beside each other in the slots before the last.
    """
    moves, free = [], slot
    for end in [*_find_starts(mixes)[1:], len(mixes)]:
        if end > slot and free != end - 1:
            moves.append((end - 1, free))
            free = end - 1
    return moves


def _find_starts(mixes: Sequence[Hashable]) -> list[int]:
    return [slot for slot, mix in enumerate(mixes) if slot == 0 or mixes[slot - 1] != mix]
