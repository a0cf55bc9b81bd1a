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
    current: str | None = None
    taken = came = 0
    arrivals: dict[int, tuple[int, int]] = {}  # by request: those that waited before it, and how many had been taken
    for event in [*events, *[None] * len(events)]:
        if event is not None:
            request = Request(event)
            arrivals[id(request)] = (len(waiting), taken)
            waiting.append(request)
            came += 1
        elif waiting:
            begun = take_next(waiting, current, patience)
            assert begun is not None
            current = begun.key
            before, taken_then = arrivals[id(begun)]
            assert taken - taken_then <= before + patience
            taken += 1
    assert taken == came
    assert not waiting


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=30))
def test_without_patience_requests_run_in_the_order_of_arrival(keys: list[str]) -> None:
    waiting = [Request(key) for key in keys]
    order = list(waiting)
    assert [take_next(waiting, "a", 0) for _ in keys] == order


# A number: so many of the requests that run, as a share, end. A letter: a request for that variant comes.
BUSY = st.lists(st.integers(1, 4) | st.sampled_from("abc"), max_size=120)


@given(BUSY, st.integers(0, 5), st.integers(1, 4))
def test_the_bound_holds_when_several_run_and_all_have_one_key(events: list[int | str], patience: int, rows: int) -> None:
    waiting: list[Request] = []
    running: list[Request] = []
    current: str | None = None
    taken = came = 0
    arrivals: dict[int, tuple[int, int]] = {}  # by request: those that waited before it, and how many had been taken
    for event in [*events, *[1] * (2 * len(events) + 2)]:
        if isinstance(event, str):
            request = Request(event)
            arrivals[id(request)] = (len(waiting), taken)
            waiting.append(request)
            came += 1
        else:
            del running[:event]
        while len(running) < rows:
            begun = take_next(waiting, current, patience, running=len(running))
            if begun is None:
                break
            current = begun.key
            running.append(begun)
            before, taken_then = arrivals[id(begun)]
            assert taken - taken_then <= before + patience
            taken += 1
        assert len({request.key for request in running}) <= 1
        assert running or not waiting
    assert taken == came


def test_requests_of_the_current_variant_go_first() -> None:
    waiting = [Request("b"), Request("a"), Request("b"), Request("a")]
    current, order = "a", ""
    while waiting:
        begun = take_next(waiting, current, 8)
        assert begun is not None
        current = begun.key
        order += current
    assert order == "aabb"


def test_the_oldest_goes_when_none_is_current() -> None:
    assert choose_next([Request("b"), Request("c")], "a", 8) == 0
