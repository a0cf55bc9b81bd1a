"""Requests that end early, shift their context, or run under asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from edgelora_runtime import Runtime, UsageError
from edgelora_runtime.session.model import PREFILL_CHUNK, _Steps
from tests.runtime.test_runtime import generate_alone
from tests.tiny import random_tokens

if TYPE_CHECKING:
    from pathlib import Path

CONTEXT = 1024


# --- ending early ----------------------------------------------------------------------------------------------------------


def test_a_cancelled_stream_gives_what_it_has(bundle32: Path, runtime: Runtime) -> None:
    prompt = random_tokens(20)
    stream = runtime.stream(prompt, variant="base", max_tokens=500, ignore_eos=True)
    text = next(stream) + next(stream)
    stream.cancel()
    text += "".join(stream)
    assert stream.generation is not None
    assert stream.generation.finish_reason == "cancelled"
    assert stream.generation.text == text
    whole = generate_alone(bundle32, prompt, variant="base", max_tokens=500, ignore_eos=True)
    assert stream.generation.tokens == whole[: len(stream.generation.tokens)]


def test_a_long_prompt_is_cancelled_between_its_chunks(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second thread cancels while the first chunk is read; the second chunk is never read."""
    prompt = random_tokens(PREFILL_CHUNK + 200)
    stream = runtime.stream(prompt, variant="base", max_tokens=5)
    step, chunks = _Steps.run, []

    def cancel_during_step(steps: _Steps, cache: Any, tokens: Any, *rest: Any) -> Any:
        chunks.append(len(tokens))
        thread = threading.Thread(target=stream.cancel)
        thread.start()
        thread.join()
        return step(steps, cache, tokens, *rest)

    monkeypatch.setattr(_Steps, "run", cancel_during_step)
    assert list(stream) == [""]
    assert stream.generation is not None
    assert stream.generation.finish_reason == "cancelled"
    assert chunks == [PREFILL_CHUNK]
    monkeypatch.undo()
    assert runtime.generate(prompt, variant="base", max_tokens=1).reused_tokens == PREFILL_CHUNK, "the first chunk stays cached"


def test_a_timeout_ends_a_generation(runtime: Runtime) -> None:
    started = time.monotonic()
    found = runtime.generate(random_tokens(5), max_tokens=10**6, overflow="slide", ignore_eos=True, timeout=0.3)
    assert found.finish_reason == "timeout"
    assert time.monotonic() - started < 10


def test_a_timeout_in_the_past_ends_a_generation_at_once(runtime: Runtime) -> None:
    stream = runtime.stream(random_tokens(5), timeout=1e-9)
    time.sleep(0.01)
    assert list(stream) == [""]
    assert stream.generation is not None
    assert (stream.generation.finish_reason, stream.generation.tokens) == ("timeout", ())


# --- context shifts -----------------------------------------------------------------------------------------------------------


def shift_by_hand(bundle: Path, prompt: list[int], count: int) -> list[int]:
    """What a fresh runtime writes token by token, with the context shifted as documented."""
    seen = list(prompt)
    written: list[int] = []
    with Runtime(bundle, threads=1, cache_budget=0) as runtime:
        while len(written) < count:
            if len(seen) > CONTEXT:
                kept = min(CONTEXT, CONTEXT - min(count - len(written), CONTEXT // 2) + 1)
                seen = seen[:4] + seen[-(kept - 4) :]
            token = int(runtime.logits(seen, variant="base")[-1].argmax())
            written.append(token)
            seen.append(token)
    return written


@pytest.mark.parametrize(("length", "count"), [(1020, 12), (1024, 3), (1100, 6)])
def test_the_context_shifts_as_documented(bundle32: Path, runtime: Runtime, length: int, count: int) -> None:
    prompt = random_tokens(length, seed=7)
    found = runtime.generate(prompt, variant="base", max_tokens=count, overflow="slide", ignore_eos=True)
    assert list(found.tokens) == shift_by_hand(bundle32, prompt, count)
    assert found.dropped_tokens > 0
    assert found.prompt_tokens == length


def test_the_context_shifts_many_times(runtime: Runtime) -> None:
    found = runtime.generate(random_tokens(1000), variant="base", max_tokens=1300, overflow="slide", ignore_eos=True)
    assert len(found.tokens) == 1300
    assert found.dropped_tokens >= 1000 + 1300 - 1 - CONTEXT, "the last token is never read back"


def test_no_context_shift_for_a_text_that_fits(runtime: Runtime) -> None:
    found = runtime.generate(random_tokens(1000), variant="base", max_tokens=25, overflow="slide")
    assert found.dropped_tokens == 0


# --- asyncio ------------------------------------------------------------------------------------------------------------------


def test_async_calls_write_what_others_write(bundle32: Path, runtime: Runtime) -> None:
    prompts = [random_tokens(20 + seed, seed=seed) for seed in range(4)]
    expected = [generate_alone(bundle32, prompt, variant="plain", max_tokens=20) for prompt in prompts]

    async def run() -> list[tuple[int, ...]]:
        found = await asyncio.gather(*(runtime.generate_async(p, variant="plain", max_tokens=20) for p in prompts))
        stream = runtime.stream(prompts[0], variant="plain", max_tokens=20)
        pieces = [piece async for piece in stream]
        assert "".join(pieces) == found[0].text
        return [each.tokens for each in found]

    assert asyncio.run(run()) == expected


def test_a_cancelled_task_frees_the_model(runtime: Runtime) -> None:
    async def run() -> None:
        task = asyncio.create_task(
            runtime.generate_async(random_tokens(5), variant="base", max_tokens=10**6, overflow="slide", ignore_eos=True)
        )
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())  # waits for the threads
    assert runtime.generate(random_tokens(5), variant="base", max_tokens=1).tokens


def test_errors_reach_the_awaiting_task(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="no variant 'nope'"):
        asyncio.run(runtime.generate_async("a", variant="nope"))
