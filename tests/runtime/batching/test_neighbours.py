"""The order of rows in a batch, for any order in which requests come and go."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from edgelora_runtime.batching.neighbours import close_gap, make_room


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 100)), max_size=60))
def test_equal_mixes_stay_beside_each_other(events: list[tuple[bool, int, int]]) -> None:
    rows: list[tuple[int, int]] = []  # mix and number by slot
    for number, (comes, mix, place) in enumerate(events):
        mixes = [row[0] for row in rows]
        slots = dict(enumerate(rows))
        if comes or not rows:
            slot, moves = make_room(mixes, mix)
            expected = {*rows, (mix, number)}
        else:
            slot = place % len(rows)
            moves = close_gap(mixes, slot)
            expected = {*rows} - {slots.pop(slot)}
        assert len(moves) <= len(set(mixes))
        for start, to in moves:
            assert to not in slots, "a move ends in a slot that is taken"
            slots[to] = slots.pop(start)
        if comes or not rows:
            assert slot not in slots
            slots[slot] = (mix, number)
        assert sorted(slots) == list(range(len(expected)))
        rows = [slots[each] for each in sorted(slots)]
        assert set(rows) == expected
        groups = [mix for mix, _ in groupby(row[0] for row in rows)]
        assert len(groups) == len(set(groups))
