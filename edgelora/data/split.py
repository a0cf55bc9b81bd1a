"""Splits rows into those to train on and those to validate on."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from edgelora_runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora.data.rows import Row


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Splits rows into training and validation rows, each in the order of the file.

    share: of the rows that are to validate on, more than 0 and less than 1. Equal rows stay on one side, so that no row is
    validated on that was trained on. The same rows, share and seed give the same split. Raises UsageError for another share, and
    InputError if the rows are too few, or too much alike, to have one on either side.
    """
    if not 0 < share < 1:
        raise UsageError(f"validation {share}: give a file, or a share of the rows that is more than 0 and less than 1")
    places: dict[Row, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row, []).append(place)
    if len(places) < 2:
        raise InputError(f"{len(rows)} rows hold {len(places)} that differ, too few to split; give a validation file")
    groups = list(places.values())
    random.Random(f"{seed} {len(rows)}").shuffle(groups)  # noqa: S311  (not for secrets)
    wanted = max(1, round(share * len(rows)))
    chosen = set(groups[0])
    for group in groups[1:-1]:  # the last one is left to train on
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    return (
        [row for place, row in enumerate(rows) if place not in chosen],
        [row for place, row in enumerate(rows) if place in chosen],
    )
