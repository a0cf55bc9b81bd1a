"""The order of waiting requests: few switches, and a bound on waiting that holds for any arrivals."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from edgelora_runtime.serve.policy import choose_next, take_next


@dataclass(eq=False)
class Request:
    key: str
    passed: int = 0


# None: the worker takes the next request. A letter: a request for that variant comes.
EVENTS = st.lists(st.none() | st.sampled_from("abc"), max_size=120)


@given(EVENTS, st.integers(0, 5))
def test_nobody_waits_for_more_than_those_before_and_patience_others(events: list[str | None], patience: int) -> None:
    waiting: list[Request] = []
    current, taken, came = None, 0, 0
    arrivals: dict[int, tuple[int, int]] = {}  # by request: those that waited before it, and how many had been taken
    for event in [*events, *[None] * len(events)]:
        if event is not None:
            request = Request(event)
            arrivals[id(request)] = (len(waiting), taken)
            waiting.append(request)
            came += 1
        elif waiting:
            request = take_next(waiting, current, patience)
            current = request.key
            before, taken_then = arrivals[id(request)]
            assert taken - taken_then <= before + patience
            taken += 1
    assert taken == came
    assert not waiting


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=30))
def test_without_patience_requests_run_in_the_order_of_arrival(keys: list[str]) -> None:
    waiting = [Request(key) for key in keys]
    order = list(waiting)
    assert [take_next(waiting, "a", 0) for _ in keys] == order


def test_requests_of_the_current_variant_go_first() -> None:
    waiting = [Request("b"), Request("a"), Request("b"), Request("a")]
    current, order = "a", ""
    while waiting:
        current = take_next(waiting, current, 8).key
        order += current
    assert order == "aabb"


def test_the_oldest_goes_when_none_is_current() -> None:
    assert choose_next([Request("b"), Request("c")], "a", 8) == 0
