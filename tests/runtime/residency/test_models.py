"""Loaded models: the budget, pins, prefetching, shared bytes, and one load for concurrent requests."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgelora_runtime import Bundle, Runtime, UsageError
from edgelora_runtime.residency.live_mixes import LiveMixes
from edgelora_runtime.residency.memory import find_free_memory
from edgelora_runtime.residency.models import LoadedModels
from edgelora_runtime.session.fair_lock import FairLock
from tests.tiny import random_tokens

if TYPE_CHECKING:
    from pathlib import Path


class FakeModel:
    """Stands for a loaded graph; only its identity matters."""


def make_models(
    sizes: dict[str, dict[str, int]], budget: int | None, stages: dict[str, dict[str, int]] | None = None
) -> tuple[LoadedModels, list[str]]:
    """Loaded models for graphs with these blobs, by default one stage each, and a list that receives each graph it loads."""
    loaded: list[str] = []

    def load(graph: str) -> FakeModel:
        loaded.append(graph)
        return FakeModel()

    whole = {graph: {graph: sum(blobs.values())} for graph, blobs in sizes.items()}
    return LoadedModels(load, sizes, stages or whole, budget=budget), loaded  # type: ignore[arg-type]


def test_bytes_are_counted_once_where_blobs_are_shared() -> None:
    models, _ = make_models({"a": {"x": 100, "y": 8}, "b": {"x": 100, "z": 12}}, None)
    models.get("a")
    assert models.measure(0, 0).shared == 0
    models.get("b")
    memory = models.measure(3, 7)
    assert (memory.mapped, memory.shared, memory.live, memory.kv_caches) == (120, 100, 3, 7)
    assert memory.private == int(108 * 1.25) + int(112 * 1.25)
    assert memory.graphs == ("a", "b")


def test_an_evicted_model_counts_while_it_is_in_use() -> None:
    models, _ = make_models({name: {name: 100} for name in "abc"}, 250)
    held, _ = models.get("a")
    models.get("b")
    models.get("c")  # neither fits beside a, which is still in use
    assert models.measure(0, 0).private == 250, "a, which was evicted, and c"
    assert models.measure(0, 0).graphs == ("c",)
    del held
    assert models.measure(0, 0).private == 125
    models.get("a")
    assert models.measure(0, 0).graphs == ("c", "a")


def test_shared_stages_count_once_until_their_last_graph_goes() -> None:
    stages = {"a": {"a1": 10, "both": 100}, "b": {"b1": 20, "both": 100}, "c": {"c1": 40}}
    models, loaded = make_models({name: {} for name in stages}, 163, stages)
    models.get("a")
    models.get("b")
    assert models.measure(0, 0).private == int(10 * 1.25) + int(20 * 1.25) + 125, "130 * 1.25 are just in the budget"
    models.get("c")
    assert models.measure(0, 0).graphs == ("c",), "b had to go as well: without a, it still holds the shared stage"
    assert loaded == ["a", "b", "c"]


def test_pinned_models_are_never_evicted() -> None:
    models, loaded = make_models({name: {name: 100} for name in "abc"}, 130)
    models.pin("a")
    for graph in "abcb":
        models.get(graph)
    assert models.measure(0, 0).graphs == ("a", "b")
    models.unpin("a")
    models.get("c")
    assert models.measure(0, 0).graphs == ("c",)
    assert loaded == list("abcbc")


def test_one_thread_loads_and_the_others_wait() -> None:
    started, go = threading.Event(), threading.Event()
    loads: list[str] = []

    def load(graph: str) -> FakeModel:
        loads.append(graph)
        started.set()
        go.wait(10)
        return FakeModel()

    models = LoadedModels(load, {"a": {"x": 1}}, {"a": {"a": 1}}, budget=None)  # type: ignore[arg-type]
    found: list[tuple[object, bool]] = []
    threads = [threading.Thread(target=lambda: found.append(models.get("a"))) for _ in range(5)]
    threads[0].start()
    started.wait(10)
    for thread in threads[1:]:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(10)
    assert loads == ["a"]
    assert len({id(model) for model, _ in found}) == 1
    assert sum(cold for _, cold in found) == 1


def test_a_failed_load_fails_for_all_waiting_threads_and_is_retried() -> None:
    tries: list[int] = []

    def load(_: str) -> FakeModel:
        tries.append(1)
        if len(tries) == 1:
            raise UsageError("no")
        return FakeModel()

    models = LoadedModels(load, {"a": {}}, {"a": {}}, budget=None)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        models.get("a")
    assert models.measure(0, 0).graphs == ()
    assert models.get("a")[1]


def test_memory_of_a_bundle_matches_its_manifest(bundle32: Path) -> None:
    manifest = Bundle.open(bundle32).manifest
    blobs = {name: set(manifest.variants[name].graphs["cpu"].blobs) for name in ("base", "plain")}
    sizes = {name: manifest.files[name].size for name in blobs["base"] | blobs["plain"]}
    with Runtime(bundle32, threads=1) as runtime:
        assert runtime.memory.graphs == ()
        runtime.switch("base")
        runtime.switch("plain")
        assert runtime.memory.mapped == sum(sizes.values())
        assert runtime.memory.shared == sum(sizes[name] for name in blobs["base"] & blobs["plain"])
        assert runtime.memory.kv_caches == 0
        runtime.generate(random_tokens(30), max_tokens=1)
        model = manifest.model
        assert runtime.memory.kv_caches == 30 * 2 * 4 * model.layers * model.kv_heads * model.head_size


def test_prefetch_loads_in_the_background(bundle32: Path) -> None:
    with Runtime(bundle32, threads=1) as runtime:
        receipt = runtime.prefetch("plain").result(timeout=30)
        assert receipt.cold
        assert not runtime.switch("plain").cold
        assert not runtime.prefetch("plain").result(timeout=30).cold
        assert runtime.current == "plain", "prefetch does not change the current variant"
        with pytest.raises(UsageError, match="no variant 'nope'"):
            runtime.prefetch("nope")


def test_a_pinned_variant_stays_loaded(bundle32: Path) -> None:
    with Runtime(bundle32, threads=1, memory_budget=1) as runtime:
        runtime.pin("base")
        for variant in ("base", "plain", "ties"):
            assert runtime.switch(variant).cold
        assert not runtime.switch("base").cold
        runtime.unpin("base")
        runtime.switch("plain")
        assert runtime.switch("base").cold
        with pytest.raises(UsageError):
            runtime.pin("nope")


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_live_mixes_are_kept_under_their_budget(bundle32: Path, budget: int) -> None:
    bundle = Bundle.open(bundle32)
    mixes = LiveMixes(bundle, budget)
    float32 = np.dtype(np.float32)
    first, made = mixes.get((("plain", 1.0),), float32)
    assert made == sum(array.nbytes for array in first.values())
    second, _ = mixes.get((("other", 0.5), ("plain", 1.0)), float32)
    assert mixes.get((("other", 0.5), ("plain", 1.0)), float32)[0] is second, "the last mix stays"
    again, made = mixes.get((("plain", 1.0),), float32)
    assert (again is first) == (made == 0) == (budget > 0)
    for name, array in first.items():
        np.testing.assert_array_equal(again[name], array)
    assert mixes.bytes > (0 if budget == 0 else made)
    mixes.clear()
    assert mixes.bytes == 0


def test_free_memory_is_less_than_the_total() -> None:
    free = find_free_memory()
    assert free is not None
    assert 0 < free < 1 << 46


def test_a_fair_lock_is_granted_in_order() -> None:
    lock, order = FairLock(), []
    threads = []

    def work(number: int) -> None:
        with lock:
            order.append(number)

    with lock:
        for number in range(20):
            threads.append(threading.Thread(target=work, args=(number,)))
            threads[-1].start()
            time.sleep(0.005)  # so that it queues before the next
    for thread in threads:
        thread.join(10)
    assert order == list(range(20))


def test_a_fair_lock_excludes_others_and_starves_none() -> None:
    lock, together, inside, acquired = FairLock(), threading.Barrier(2), [0], [0, 0]

    def work(index: int) -> None:
        together.wait(10)
        while sum(acquired) < 200:
            with lock:
                inside[0] += 1
                time.sleep(0.0005)  # a step, which lets the other thread run
                assert inside[0] == 1
                acquired[index] += 1
                inside[0] -= 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert abs(acquired[0] - acquired[1]) < 20, "a thread that acquires it again at once queues behind the other"
    with lock:
        pass
