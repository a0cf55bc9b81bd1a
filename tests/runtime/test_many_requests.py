"""A thousand requests from many threads over variants and mixes: each answer is the one it gets alone, and memory stays flat."""

from __future__ import annotations

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from edgelora_runtime import Runtime
from edgelora_runtime.residency.memory import find_anonymous_memory
from tests.tiny import random_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CHOICES: list[dict[str, Any]] = [
    {"variant": "base"},
    {"variant": "plain"},
    {"variant": "ties"},
    {"variant": "plain-live"},
    {"mix": {"plain": 0.5, "other": -0.8}},
    {"mix": {"plain": 0.2, "other": 0.9}},
]
PROMPTS = [random_tokens(5 + 3 * number, seed=number) for number in range(10)]
REQUESTS, THREADS = 1000, 16


@pytest.mark.parametrize("budgets", [{}, {"memory_budget": "1MB", "cache_budget": "100KB"}], ids=["roomy", "tight"])
def test_a_thousand_requests_from_sixteen_threads(bundle4: Path, budgets: dict[str, Any]) -> None:
    """In int4, as bundles ship; with tight budgets, variants and caches are constantly evicted while threads use them."""
    jobs = [(choice, prompt) for choice in range(len(CHOICES)) for prompt in range(len(PROMPTS))]
    expected = {}
    for choice, prompt in jobs:
        with Runtime(bundle4, threads=1) as alone:
            expected[choice, prompt] = alone.generate(PROMPTS[prompt], max_tokens=12, **CHOICES[choice]).tokens
    order = [random.Random(0).choice(jobs) for _ in range(REQUESTS)]
    wrong: list[tuple[int, int]] = []
    with Runtime(bundle4, threads=1, **budgets) as runtime:
        started = threading.Barrier(THREADS)

        def work(mine: Sequence[tuple[int, int]]) -> int:
            started.wait(30)
            for count, (choice, prompt) in enumerate(mine):
                if runtime.generate(PROMPTS[prompt], max_tokens=12, **CHOICES[choice]).tokens != expected[choice, prompt]:
                    wrong.append((choice, prompt))
                if count == len(mine) // 2:
                    half.append(find_anonymous_memory() or 0)
            return len(mine)

        half: list[int] = []
        with ThreadPoolExecutor(THREADS) as pool:
            done = list(pool.map(work, [order[number::THREADS] for number in range(THREADS)]))
        if sys.platform == "linux":
            assert min(half) > 0
            assert (find_anonymous_memory() or 0) < 1.05 * max(half), "memory grew in the second half"
    assert sum(done) == REQUESTS
    assert wrong == []
