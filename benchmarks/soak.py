"""A long run of `edgelora serve` under mixed requests: errors, wrong answers, and the growth of its memory and descriptors.

    python -m benchmarks.soak bundle --minutes 60

The bundle's base has a chat template. Requests go to all its variants, and to mixes of its live adapters where it has some:
chats, completions, responses, JSON schemas, embeddings, Ollama's chats and llama.cpp's scales, whole and streamed. Some clients
leave in the middle, and some requests are refused on purpose. All answers are greedy. Each distinct request is first asked alone,
of a server that runs one request at a time. Every later answer has to be equal to that one. With onnxruntime's kernels answers
may part where two tokens are nearly equally likely. Linux only: memory and descriptors are read from /proc. Time in which the
processes were stopped from outside is told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks.serving import read_cpu_seconds
from benchmarks.workers import report
from edgelora.cli.terminal import print_json, print_table
from edgelora.machine import describe_machine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

TOPICS = ("the moon", "rivers", "iron", "the number seven", "winter", "bread", "a lighthouse", "a city by the sea")
SYSTEM = {"role": "system", "content": "You answer in one or two short sentences, and you never use lists."}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
MIX_WEIGHTS = (-0.5, 0.25, 0.5, 0.7, 1.0)
CHECKED = {"chat": 6, "completion": 4, "response": 2, "schema": 2, "embedding": 2, "ollama": 1, "lora": 2}  # kinds with shares
LEAVING, REFUSED = 0.05, 0.02  # shares of the requests
SAMPLE_SECONDS = 10.0
WARM_UP = 0.2  # share of the time before the slope of the memory counts


@dataclass(frozen=True)
class Ask:
    """One request: its kind, its path and its body."""

    kind: str
    path: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """A server's state at a time. memory and private: MiB resident, and of them those of no file."""

    seconds: float
    memory: float
    private: float
    descriptors: int
    threads: int


@dataclass
class Course:
    """What happened so far. differing and failed: one line per answer that is not the one due."""

    asked: Counter[str] = field(default_factory=Counter)
    differing: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second, in bursts")
    parser.add_argument("--clients", type=int, default=8, help="the largest number of requests at once")
    parser.add_argument("--distinct", type=int, default=200, help="different requests, each asked alone first")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of the server")
    parser.add_argument("--kernels", default="auto", help="as in edgelora serve")
    parser.add_argument(
        "--cache-budget", default="64MiB", help="as in edgelora serve; small, so that it fills before memory counts"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # through the blocks that end the server
    draw = random.Random(arguments.seed)
    options = ["--threads", arguments.threads, "--kernels", arguments.kernels, "--cache-budget", arguments.cache_budget]
    with serve(arguments.bundle, *options, "--batch", 1) as (_, url):
        asked = draw_requests(url, arguments.distinct, draw)
        report(f"asking {len(asked)} requests alone")
        due = asyncio.run(ask_alone(url, asked))
    course = Course()
    with serve(arguments.bundle, *options, "--queue", 2 * arguments.clients) as (process, url):
        report(f"asking for {arguments.minutes:g} minutes")
        cpu, started = read_cpu_seconds(process.pid), time.monotonic()
        asyncio.run(run(url, process.pid, list(zip(asked, due, strict=True)), arguments, draw, course))
        share = (read_cpu_seconds(process.pid) - cpu) / (time.monotonic() - started)
        figures = read_figures(url)
    record = summarize(course, figures, share)
    if arguments.json:
        print_json({"machine": describe_machine(), **record})
    else:
        rows = [[name, f"{value:.2f}" if isinstance(value, float) else str(value)] for name, value in record.items()]
        print_table(f"{arguments.bundle.name}: {arguments.minutes:g} minutes", ["figure", "value"], rows)
    for line in (course.differing + course.failed)[:20]:
        print(line, file=sys.stderr)
    sys.exit(1 if course.differing or course.failed else 0)


@contextmanager
def serve(bundle: Path, *options: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs `edgelora serve` on a free port, and ends it with SIGTERM. Raises RuntimeError if its exit code is another one's."""
    command = [sys.executable, "-m", "edgelora", "serve", bundle, "--port", 0, "--json", *options]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start: exit code {process.wait()}")
        yield process, json.loads(line)["url"]
    finally:
        process.terminate()
        code = process.wait()
    if code != 143:
        raise RuntimeError(f"the server ended with exit code {code} after SIGTERM, not 143")


def draw_requests(url: str, count: int, draw: random.Random) -> list[Ask]:
    """Draws different requests over all variants of a server and mixes of its live adapters."""
    variants = httpx.get(f"{url}/v1/models").json()["data"]
    names = [each["id"] for each in variants if each["kind"] != "router"]
    live = [each["id"] for each in variants if each["kind"] == "live"]
    adapters = [each["path"] for each in httpx.get(f"{url}/lora-adapters").json()]
    kinds = {kind: share for kind, share in CHECKED.items() if live or kind != "lora"}
    found: dict[str, Ask] = {}
    for _ in range(20 * count):
        kind = draw.choices(list(kinds), list(kinds.values()))[0]
        ask = draw_request(kind, names, live, adapters, draw)
        found[json.dumps([ask.path, ask.body])] = ask
        if len(found) == count:
            break
    return list(found.values())


def draw_request(kind: str, names: Sequence[str], live: Sequence[str], adapters: Sequence[str], draw: random.Random) -> Ask:
    weights = (
        [(name, draw.choice(MIX_WEIGHTS)) for name in draw.sample(adapters, draw.randint(1, min(3, len(adapters))))]
        if live
        else []
    )
    model = "+".join(f"{name}:{weight}" for name, weight in weights) if weights and draw.random() < 0.5 else draw.choice(names)
    text = f"Tell me about {draw.choice(TOPICS)}, part {draw.randint(1, 5)}."
    messages = [{"role": "user", "content": text}]
    if draw.random() < 0.3:  # several requests begin with equal tokens, whose keys and values are kept
        messages = [SYSTEM, *messages]
    tokens = draw.randint(1, 24)
    greedy = {"model": model, "temperature": 0}
    if kind == "completion":
        return Ask(kind, "/v1/completions", {**greedy, "prompt": text, "max_tokens": tokens})
    if kind == "response":
        return Ask(kind, "/v1/responses", {**greedy, "input": messages, "max_output_tokens": max(16, tokens)})
    if kind == "embedding":
        return Ask(kind, "/v1/embeddings", {"model": model, "input": [text, messages[0]["content"]], "encoding_format": "base64"})
    if kind == "ollama":
        options = {"num_predict": tokens, "temperature": 0}
        return Ask(kind, "/api/chat", {"model": model, "messages": messages, "options": options, "stream": False})
    body: dict[str, Any] = {**greedy, "messages": messages, "max_tokens": tokens}
    if kind == "schema":
        schema = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
        body |= {"response_format": schema, "max_tokens": 48}
    if kind == "lora":
        ids = [{"id": adapters.index(name), "scale": weight} for name, weight in weights]
        body |= {"model": draw.choice(live), "lora": ids}
    return Ask(kind, "/v1/chat/completions", body)


async def ask_alone(url: str, asked: Sequence[Ask]) -> list[Any]:
    """Returns the answers to requests that are sent one after another. Raises RuntimeError for one that is refused."""
    found = []
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        for ask in asked:
            response = await client.post(ask.path, json=ask.body)
            if response.status_code != 200:
                raise RuntimeError(f"{ask.kind}: {response.status_code} {response.text[:300]}")
            found.append(read_answer(ask.kind, response.json()))
    return found


async def run(
    url: str,
    pid: int,
    pairs: Sequence[tuple[Ask, Any]],
    arguments: argparse.Namespace,
    draw: random.Random,
    course: Course,
) -> None:
    """Sends bursts of requests until the time is over, and samples the server's state beside them."""
    started = time.monotonic()
    sampling = asyncio.create_task(sample(pid, started, course))
    limits = httpx.Limits(max_connections=arguments.clients)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        while (begun := time.monotonic()) - started < 60 * arguments.minutes:
            count = draw.randint(1, arguments.clients)
            await asyncio.gather(*(ask_one(client, *draw.choice(pairs), draw, course) for _ in range(count)))
            await asyncio.sleep(max(0.0, count / arguments.rate - (time.monotonic() - begun)))
    sampling.cancel()
    with suppress(asyncio.CancelledError):
        await sampling
    course.samples.append(read_state(pid, time.monotonic() - started))


async def ask_one(client: httpx.AsyncClient, ask: Ask, due: Any, draw: random.Random, course: Course) -> None:
    """Sends one request and holds its answer against the one that is due. Some clients leave, and some requests are wrong."""
    chance = draw.random()
    streams = ask.kind in ("chat", "completion", "lora", "schema") and draw.random() < 0.5
    body = {**ask.body, "stream": True, "stream_options": {"include_usage": True}} if streams else dict(ask.body)
    try:
        if chance < LEAVING:
            course.asked["left"] += 1
            await leave(client, ask.path, body, draw.uniform(0.01, 0.4))
            return
        if chance < LEAVING + REFUSED:
            course.asked["refused"] += 1
            response = await client.post(ask.path, json={**body, "model": "no such model"})
            if response.status_code != 404:
                course.failed.append(f"an unknown model: {response.status_code} {response.text[:200]}")
            return
        course.asked[f"{ask.kind}, streamed" if streams else ask.kind] += 1
        response = await client.post(ask.path, json=body)
        if response.status_code != 200:
            course.failed.append(f"{ask.kind}: {response.status_code} {response.text[:200]}")
            return
        found = read_stream(response.text) if streams else read_answer(ask.kind, response.json())
        if found != due:
            course.differing.append(f"{ask.kind} {json.dumps(ask.body)[:300]}: {str(found)[:200]}, alone {str(due)[:200]}")
    except (httpx.HTTPError, KeyError, ValueError) as error:
        course.failed.append(f"{ask.kind}: {type(error).__name__} {error}")


async def leave(client: httpx.AsyncClient, path: str, body: Mapping[str, Any], seconds: float) -> None:
    """Sends a request, and closes its connection after a time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            async with client.stream("POST", path, json=body) as response:
                async for _ in response.aiter_bytes():
                    pass


def read_answer(kind: str, said: Mapping[str, Any]) -> Any:
    """The part of an answer that depends on the request alone."""
    if kind == "embedding":
        return [each["embedding"] for each in said["data"]]
    if kind == "response":
        return [said["output"][0]["content"][0]["text"], said["status"], said["usage"]["output_tokens"]]
    if kind == "ollama":
        return [said["message"]["content"], said["done_reason"], said["prompt_eval_count"], said["eval_count"]]
    (choice,), usage = said["choices"], said["usage"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return [text, choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"]]


def read_stream(text: str) -> Any:
    """What read_answer returns of a chat or completion, from its stream."""
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    usage = events[-1]["usage"]
    said = "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
    return [said, choices[-1]["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"]]


async def sample(pid: int, started: float, course: Course) -> None:
    while True:
        course.samples.append(read_state(pid, time.monotonic() - started))
        await asyncio.sleep(SAMPLE_SECONDS)


def read_state(pid: int, seconds: float) -> Sample:
    folder = Path("/proc") / str(pid)
    lines = (line.partition(":") for line in (folder / "status").read_text(encoding="utf-8").splitlines())
    fields = {name: value.split() for name, _, value in lines}
    memory, private = (int(fields[name][0]) / 1024 for name in ("VmRSS", "RssAnon"))
    return Sample(seconds, memory, private, len(list((folder / "fd").iterdir())), int(fields["Threads"][0]))


def read_figures(url: str) -> dict[str, float]:
    """The server's own figures by name, summed over their labels."""
    found: Counter[str] = Counter()
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] += float(value)  # type: ignore[assignment]  # a Counter of floats
    return dict(found)


def summarize(course: Course, figures: Mapping[str, float], share: float) -> dict[str, Any]:
    """The figures of a run. Slopes are MiB per hour by least squares, after the warm-up."""
    last = course.samples[-1].seconds
    counted = [one for one in course.samples if one.seconds >= WARM_UP * last]
    gaps = [after.seconds - before.seconds for before, after in pairwise(course.samples)]
    first, end = course.samples[min(1, len(course.samples) - 1)], course.samples[-1]
    record: dict[str, Any] = {
        "minutes": last / 60,
        "minutes stopped": sum(gap - SAMPLE_SECONDS for gap in gaps if gap > 2 * SAMPLE_SECONDS) / 60,
        "requests": course.asked.total(),
        **{f"requests: {kind}": count for kind, count in sorted(course.asked.items())},
        "errors": len(course.failed),
        "wrong answers": len(course.differing),
        "switches": int(figures["edgelora_switches_total"]),
        "requests still held": int(figures["edgelora_held_requests"]),
        "share of one core": share,
        "samples": len(course.samples),
    }
    for name in ("memory", "private"):
        line = statistics.linear_regression([one.seconds / 3600 for one in counted], [getattr(one, name) for one in counted])
        record[f"{name}: MiB first"] = getattr(counted[0], name)
        record[f"{name}: MiB last"] = getattr(end, name)
        record[f"{name}: MiB per hour"] = line.slope
    for name in ("descriptors", "threads"):
        values = [getattr(one, name) for one in course.samples]
        record[name] = f"{getattr(first, name)} first, {values[-1]} last, {max(values)} at most"
    return record


if __name__ == "__main__":
    main()
