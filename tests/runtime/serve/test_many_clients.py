"""Many clients at once: a bounded queue, and clients that leave free the model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.runtime.serve.servers import LONG, Server

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENTS, QUEUE = 200, 16
MODELS = ("base", "plain", "other", "plain:0.5+rslora:0.5")


@pytest.fixture(scope="module")
def busy(routed_bundle: Path) -> Iterator[Server]:
    with Server(routed_bundle, "--queue", QUEUE) as started:
        yield started


async def ask_all(url: str, count: int) -> list[tuple[int, float, str | None]]:
    """Status, seconds and Retry-After of so many requests that are sent at once."""
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        await asyncio.gather(*(client.get("/health") for _ in range(count)))  # connections are open before the clock starts

        async def ask(number: int) -> tuple[int, float, str | None]:
            body: Any = {"model": MODELS[number % 4], "prompt": f"the cat {number}", "max_tokens": 30, "ignore_eos": True}
            body["stream"] = number % 2 == 0
            started = time.perf_counter()
            response = await client.post("/v1/completions", json=body)
            return response.status_code, time.perf_counter() - started, response.headers.get("retry-after")

        return list(await asyncio.gather(*(ask(number) for number in range(count))))


def read_memory(server: Server) -> int:
    pages = Path(f"/proc/{server.process.pid}/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * 4096


def flood(server: Server, clients: int) -> None:
    """Sends so many requests at once. Each is answered, or refused with a time to come back at."""
    found = asyncio.run(ask_all(server.url, clients))
    statuses = [status for status, _, _ in found]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) > QUEUE
    assert all(1 <= int(after or 0) <= 60 for status, _, after in found if status == 429)
    server.wait_until_idle()


def test_a_full_queue_refuses_and_all_others_are_answered(busy: Server) -> None:
    flood(busy, CLIENTS)


@pytest.mark.slow
def test_floods_leave_no_memory_behind(busy: Server) -> None:
    asyncio.run(ask_all(busy.url, 40))  # loads all variants
    flood(busy, CLIENTS)
    sizes = [read_memory(busy)]
    for _ in range(5):  # allocators reach their size in a few of them, and a leak grows in each
        flood(busy, CLIENTS)
        sizes.append(read_memory(busy))
        if sizes[-1] < 1.02 * sizes[-2]:
            return
    pytest.fail(f"memory grows in each flood: {sizes}")


async def leave(url: str, count: int) -> None:
    """Starts long answers and closes the connection: while they wait, while they run, before and after the first byte."""
    draw = random.Random(0)

    async def one(stream: bool, seconds: float) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            with contextlib.suppress(httpx.HTTPError, TimeoutError):
                async with asyncio.timeout(seconds):
                    await client.post("/v1/completions", json={"model": "base", "prompt": "the", "stream": stream, **LONG})

    for _ in range(count // 10):
        await asyncio.gather(*(one(number % 2 == 0, draw.uniform(0.01, 0.2)) for number in range(10)))


def test_a_hundred_clients_that_leave_free_the_model(busy: Server) -> None:
    asyncio.run(leave(busy.url, 100))
    busy.wait_until_idle(1.0)
    assert busy.figure("edgelora_running_requests") == 0
    assert busy.chat().status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_one_client_that_leaves_frees_the_model_within_a_second(busy: Server, stream: bool) -> None:
    with httpx.Client(base_url=busy.url, timeout=0.3) as client:
        body = {"model": "plain", "prompt": "the cat", "stream": stream, **LONG}
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()  # dropping it would close the connection
                assert json.loads(next(lines).removeprefix("data: "))["choices"]
                assert busy.figure("edgelora_running_requests") == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body)
    busy.wait_until_idle(1.0)


def test_a_waiting_client_that_leaves_gives_its_place_back(busy: Server) -> None:
    async def wait_and_leave() -> None:
        async with httpx.AsyncClient(base_url=busy.url, timeout=60) as client:
            body = {"model": "base", "prompt": "the", **LONG}
            tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(5)]
            async with asyncio.timeout(5):
                while busy.figure("edgelora_held_requests") < 5:
                    await asyncio.sleep(0.01)
            for task in tasks[1:]:
                task.cancel()
            await asyncio.sleep(0.3)
            assert busy.figure("edgelora_held_requests") == 1
            tasks[0].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(wait_and_leave())
    busy.wait_until_idle()
