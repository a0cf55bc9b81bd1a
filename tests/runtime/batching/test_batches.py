"""Requests that share steps: each answer is the one it gets alone, whoever else is served, joins, leaves or is slow."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from edgelora_runtime import Runtime
from edgelora_runtime.batching.batch import Batch
from edgelora_runtime.session.kernels import Kernels, find_kernels
from edgelora_runtime.session.model import SHARED_CHUNK, Model
from tests.own_kernels import needs_kernels
from tests.tiny import random_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

PROMPTS = [random_tokens(3 + 7 * number, seed=number) for number in range(8)]
LIVE: list[dict[str, Any]] = [
    {"variant": "plain-live"},
    {"mix": {"plain": 0.5, "other": -0.8}},
    {"mix": {"plain": 0.2, "other": 0.9}},
    {"mix": {}},
]
BOTH = pytest.mark.parametrize("kernels", ["onnxruntime", pytest.param("edgelora", marks=needs_kernels)])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Batch]]:
    """All batches that a test makes."""
    found: list[Batch] = []
    start = Batch.__init__

    def note(batch: Batch, *given: Any) -> None:
        start(batch, *given)
        found.append(batch)

    monkeypatch.setattr(Batch, "__init__", note)
    yield found


def answer(runtime: Runtime, number: int, choice: dict[str, Any], **options: Any) -> tuple[tuple[int, ...], list[float]]:
    """Tokens of an answer and their log probabilities, which show a difference in the last bits."""
    settings = {"max_tokens": 24 + number, "ignore_eos": True, "logprobs": 1, "speculation": "off"}
    found = runtime.generate(PROMPTS[number], **{**settings, **choice, **options})
    return found.tokens, [each.logprob for each in found.logprobs]


def run_together(count: int, call: Any) -> list[Any]:
    """Results of call(0) … call(count - 1), from threads that start at the same time."""
    start = threading.Barrier(count)

    def run(number: int) -> Any:
        start.wait(30)
        return call(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@BOTH
def test_answers_are_those_that_each_request_gets_alone(bundle4: Path, made: list[Batch], kernels: str) -> None:
    with Runtime(bundle4, threads=1, kernels=kernels, batch=1) as alone:
        expected = [answer(alone, number, {"variant": "plain"}) for number in range(8)]
    assert not made
    with Runtime(bundle4, threads=1, kernels=kernels) as runtime:
        found = run_together(8, lambda number: answer(runtime, number, {"variant": "plain"}))
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    if kernels == "edgelora":  # onnxruntime's kernels may round one row in another way than several
        assert found == expected
    assert max(batch.rows_read / max(batch.steps, 1) for batch in made) > 2, "few shared a step"


@needs_kernels
def test_mixes_of_one_base_share_steps(bundle4: Path, made: list[Batch]) -> None:
    with Runtime(bundle4, threads=1, kernels="edgelora", batch=1) as alone:
        expected = [answer(alone, number, LIVE[number % 4]) for number in range(8)]
    with Runtime(bundle4, threads=1, kernels="edgelora") as runtime, runtime.stream(PROMPTS[0], **LIVE[0]) as held:
        next(held)  # it keeps the batch, even if no two of the others overlap for a moment
        found = run_together(8, lambda number: answer(runtime, number, LIVE[number % 4]))
        assert len({runtime.name_group(**choice) for choice in LIVE}) == 1
    assert found == expected
    assert len(made) == 1
    assert made[0].rows_read > 2 * made[0].steps


def test_with_onnxruntime_each_mix_has_a_batch(bundle4: Path, made: list[Batch]) -> None:
    with Runtime(bundle4, threads=1, kernels="onnxruntime", batch=1) as alone:
        expected = [answer(alone, number, LIVE[number % 2])[0] for number in range(8)]
    with Runtime(bundle4, threads=1, kernels="onnxruntime") as runtime:
        found = run_together(8, lambda number: answer(runtime, number, LIVE[number % 2])[0])
        assert len({runtime.name_group(**choice) for choice in LIVE}) == 4
    assert found == expected
    assert len(made) >= 2


def test_tasks_of_one_loop_share_steps(bundle4: Path, made: list[Batch]) -> None:
    """More tasks than asyncio has threads of its own."""
    options: dict[str, Any] = {"variant": "base", "max_tokens": 40, "ignore_eos": True, "speculation": "off"}

    async def ask(runtime: Runtime) -> list[tuple[int, ...]]:
        answers = await asyncio.gather(*(runtime.generate_async(PROMPTS[number % 8], **options) for number in range(16)))
        return [each.tokens for each in answers]

    with Runtime(bundle4, threads=1) as runtime:
        expected = [runtime.generate(PROMPTS[number % 8], **options).tokens for number in range(16)]
        assert not any(batch.steps for batch in made)
        runtime.close()
        assert asyncio.run(ask(runtime)) == expected
    assert sum(batch.rows_read for batch in made) > 4 * sum(batch.steps for batch in made)


def test_a_stream_that_nobody_reads_holds_up_nobody(bundle4: Path, made: list[Batch]) -> None:
    with Runtime(bundle4, threads=1) as runtime:
        expected = [answer(runtime, number, {"variant": "base"}) for number in range(3)]
        waiting = runtime.stream(PROMPTS[0], variant="base", max_tokens=24, ignore_eos=True, speculation="off")
        first = next(waiting)
        others = run_together(2, lambda number: answer(runtime, number + 1, {"variant": "base"}))
        assert others == expected[1:]
        again = waiting.read()
        assert again.tokens == expected[0][0]
        assert again.text.startswith(first)
    assert made


def test_a_cancelled_row_leaves_and_its_text_stays_cached(bundle4: Path) -> None:
    with Runtime(bundle4, threads=1) as runtime:
        expected = answer(runtime, 5, {"variant": "base"})
        runtime.close()
        other = runtime.stream(PROMPTS[6], variant="base", max_tokens=400, ignore_eos=True)
        stream = runtime.stream(PROMPTS[5], variant="base", max_tokens=400, ignore_eos=True)
        for _ in range(6):
            next(other), next(stream)
        stream.cancel()
        cut = stream.read()
        other.close()
        assert cut.finish_reason == "cancelled"
        assert 5 <= len(cut.tokens) < 400
        assert cut.tokens == expected[0][: len(cut.tokens)]
        more = runtime.generate([*PROMPTS[5], *cut.tokens], variant="base", max_tokens=4, ignore_eos=True)
        assert more.reused_tokens >= len(PROMPTS[5]) + len(cut.tokens) - 2
        assert more.tokens == expected[0][len(cut.tokens) : len(cut.tokens) + 4]


@pytest.mark.slow
def test_a_text_that_outgrows_the_context_leaves_and_joins_again(bundle4: Path) -> None:
    long: dict[str, Any] = {"variant": "base", "max_tokens": 1030, "overflow": "slide"}
    with Runtime(bundle4, threads=1) as runtime:
        expected = answer(runtime, 1, long)
        runtime.close()
        found = run_together(2, lambda number: answer(runtime, number, long))
    assert found[1] == expected


@pytest.mark.parametrize("room", [{"batch": 2}, {"cache_budget": "100KB"}], ids=["slots", "bytes"])
def test_requests_without_room_run_alone(bundle4: Path, room: dict[str, Any], made: list[Batch]) -> None:
    with Runtime(bundle4, threads=1, batch=1) as alone:
        expected = [answer(alone, number, {"variant": "base"}) for number in range(6)]
    with Runtime(bundle4, threads=1, **room) as runtime:
        assert run_together(6, lambda number: answer(runtime, number, {"variant": "base"})) == expected
    assert sum(batch.rows_read for batch in made) < 6 * 23


def test_a_failed_step_reaches_every_request_in_it_and_no_other(bundle4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, failed = Batch._compute, threading.Event()

    def fail_once(batch: Batch, rows: Any) -> Any:
        if not failed.is_set() and len(rows) == 3:
            failed.set()
            raise RuntimeError("a broken step")
        return compute(batch, rows)

    monkeypatch.setattr(Batch, "_compute", fail_once)

    def attempt(number: int) -> Any:
        try:
            return answer(runtime, number, {"variant": "base"}, max_tokens=60)
        except Exception as error:
            return str(error)

    with Runtime(bundle4, threads=1) as runtime:
        expected = answer(runtime, 3, {"variant": "base"})
        found = run_together(3, attempt)
        assert sum("a broken step" in each for each in found) == 3
        assert answer(runtime, 3, {"variant": "base"}) == expected, "the runtime goes on"


@BOTH
def test_graphs_of_one_text_still_open_and_share_no_steps(bundle_copy: Path, kernels: str, made: list[Batch]) -> None:
    """As bundles were exported before texts shared steps."""
    with Runtime(bundle_copy, threads=1, kernels=kernels) as runtime:
        expected = [answer(runtime, number, {"variant": "base"}) for number in range(3)]
        entry, file = runtime.bundle.manifest.model, runtime.variants["base"].graphs["cpu"].file
    made.clear()
    graph = onnx.load(bundle_copy / file, load_external_data=False)
    for value in (*graph.graph.input, *graph.graph.output):
        axis = value.type.tensor_type.shape.dim[0]
        if axis.dim_param == "B":
            axis.dim_value = 1
    (bundle_copy / "old.onnx").write_bytes(graph.SerializeToString())
    model = Model.open(bundle_copy / "old.onnx", entry, threads=1, kernels=choose_kernels(kernels))
    (bundle_copy / "old.onnx").unlink()
    assert not model.takes_rows
    with Runtime(bundle_copy, threads=1, kernels=kernels) as runtime:
        runtime._loaded._load = lambda graph: model
        assert run_together(3, lambda number: answer(runtime, number, {"variant": "base"})) == expected
    assert not made


def choose_kernels(name: str) -> Kernels | None:
    return find_kernels() if name == "edgelora" else None


@BOTH
def test_chunks_of_prompts_change_no_bit(bundle4: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While others are served, prompts are read in smaller chunks."""
    with Runtime(bundle4, threads=1, kernels=kernels) as runtime:
        model = runtime._loaded.get(runtime._current.graph)[0]
    sizes: list[int] = []
    run = type(model._steps).run

    def note(steps: Any, cache: Any, tokens: Any, *rest: Any) -> None:
        sizes.append(len(tokens))
        run(steps, cache, tokens, *rest)

    monkeypatch.setattr(type(model._steps), "run", note)
    for length in (1, 2, 16, 17, SHARED_CHUNK + 1, SHARED_CHUNK + 20, 512, 513, 514, 700):
        for keep in (1, min(length, 3)):  # with draft tokens, several positions get logits
            np.testing.assert_array_equal(read_with(model, length, 1, keep), read_with(model, length, 2, keep))
    assert max(sizes) == 512
    assert SHARED_CHUNK in sizes


def read_with(model: Model, length: int, requests: int, keep: int) -> NDArray[np.float32]:
    """The last logits of a prompt while so many requests are answered."""
    for _ in range(requests):
        model.step_lock.enter_request()
    logits = model.read(model.new_cache(), random_tokens(length), keep=keep).copy()
    for _ in range(requests):
        model.step_lock.leave_request()
    return logits
