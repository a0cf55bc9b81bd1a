"""Many clients: `edgelora serve` beside llama-server with slots and a LoRA per request, on one model file.

    python -m benchmarks.serving --gguf SmolLM2-135M-Instruct.Q4_1.gguf --llama-server bin/llama-server --output serving
    python -m benchmarks.serving --shape llama-3.2-1b --vocabulary SmolLM2-135M-Instruct.Q4_1.gguf --peers-python PYTHON …

Both serve one GGUF base and four random adapters of rank 16 on every linear layer, ours as live variants of an int4 bundle
(rounded to nearest), llama-server as GGUF adapters that a request's `lora` picks. Each round runs each number of clients over
one variant and over four, ours and llama-server's turn after turn. A client asks again as soon as its answer has ended. Prompts
differ from their first words on, so no server has read them before. Answers have a fixed number of tokens. Without --gguf the
model has random weights, which PYTHON's llama.cpp turns into a GGUF file with the vocabulary of another one (see peers.txt).
Figures are tokens per second of all clients together, the 95th percentile of the time to the first token, the server's CPU
seconds per token, and ratios round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks.llama_cpp import serve_llama
from benchmarks.shapes import ALL_LINEAR, SHAPES, write_adapter, write_checkpoint
from benchmarks.workers import default_cache, report, run_tool
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.composing.compose import compose
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora.machine import OtherWork, count_cores, describe_machine
from edgelora_export.plan.variants import Quantization

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.shapes import Shape

VARIANTS = (1, 4)
SLOTS = 16
RANK = 16
WORDS = ("river", "lamp", "stone", "garden", "winter", "paper", "silver", "bridge", "morning", "engine", "copper", "window")
OURS, PEER = "edgelora", "llama-server"


@dataclass(frozen=True)
class Engine:
    """A running server. choices: what a request says to get each variant."""

    url: str
    process: subprocess.Popen[Any]
    choices: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Load:
    """The requests of one measurement: so many of each client, with prompts of so many words and answers of so many tokens."""

    clients: int
    variants: int
    requests: int
    words: int
    tokens: int
    seed: str


@dataclass(frozen=True)
class Measurement:
    """What all clients together got. speed: tokens/s. first_token: seconds, 95th percentile. cpu: seconds per token."""

    speed: float
    first_token: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--gguf", type=Path, help="a model of the shape")
    model.add_argument("--vocabulary", type=Path, help="a GGUF file whose vocabulary a model of random weights gets")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter with peers.txt, for random weights")
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--llama-server", type=Path, help="the binary; without it llama.cpp is left out")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 4, 8, 16], help="numbers of clients; the first is the measure"
    )
    parser.add_argument("--words", type=int, default=40, help="of each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2, help="of each client and round")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--output", type=Path, default=default_cache() / "serving", help="folder for adapters and the bundle")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    gguf = arguments.gguf or draw_model(shape, arguments.vocabulary, arguments.peers_python, arguments.output)
    bundle, adapters = prepare(gguf, shape, arguments.output, with_gguf=arguments.llama_server is not None)
    found: dict[tuple[int, int, str], list[Measurement]] = {}
    with ExitStack() as stack:
        engines = {OURS: stack.enter_context(serve_ours(bundle, arguments.threads))}
        if arguments.llama_server is not None:
            engines[PEER] = stack.enter_context(serve_peer(arguments.llama_server, gguf, adapters, arguments.threads))
        other = OtherWork(engine.process.pid for engine in engines.values())
        for turn in range(arguments.rounds + 1):
            for variants in VARIANTS:
                for clients in arguments.clients if turn else [2]:  # the first turn warms up
                    for name, engine in engines.items():
                        seed = f"{turn}.{variants}.{clients}"
                        load = Load(clients, variants, arguments.requests, arguments.words, arguments.tokens, seed)
                        one = asyncio.run(run_clients(engine, load))
                        report(f"{name}, {variants} variants, {clients} clients: {one.speed:.1f} tokens/s")
                        if turn:
                            found.setdefault((variants, clients, name), []).append(one)
        share = other.share()
    if share is not None:
        print_note(f"other programs took {share:.0%} of the CPU")
    if arguments.json:
        print_json({"machine": describe_machine(), "rank": RANK, "figures": list_records(found, arguments.clients[0])})
    else:
        show(arguments.shape, list_records(found, arguments.clients[0]))


def draw_model(shape: Shape, vocabulary: Path, peers_python: str, output: Path) -> Path:
    """Makes a GGUF file of random weights in Q4_0, unless it lies there."""
    gguf = output / f"{shape.name}.gguf"
    if not gguf.exists():
        checkpoint = write_checkpoint(shape, output)
        report(f"writing {gguf.name}")
        options = ["--type", "q4_0-pure", "--vocabulary", str(vocabulary)]
        run_tool([peers_python, "-m", "benchmarks.peer_models", "gguf", *options, str(checkpoint), str(gguf)], PEER, "built")
    return gguf


def prepare(gguf: Path, shape: Shape, output: Path, *, with_gguf: bool) -> tuple[Path, dict[str, Path]]:
    """Writes the adapters and exports the bundle, each unless it lies there. Returns the bundle and the GGUF adapters."""
    output.mkdir(parents=True, exist_ok=True)
    shape = replace(shape, weight_unit=2.0**-12)  # small changes: answers stay text
    folders = {
        f"a{index}": write_adapter(shape, gguf, output / f"a{index}", ALL_LINEAR, rank=RANK, seed=index)
        for index in range(max(VARIANTS))
    }
    files = {name: output / f"{name}.gguf" for name in folders}
    for name, folder in folders.items() if with_gguf else ():
        if not files[name].exists():
            report(f"writing {files[name].name}")
            compose({name: (folder, 1.0)}, files[name], base=str(gguf), dtype="float16")
    bundle = output / "bundle"
    if not bundle.exists():
        report("exporting")
        variants = {name: VariantRecipe({name: 1.0}, kind="live") for name in folders}
        export(Recipe(str(gguf), folders, variants, Quantization(method="rtn")), bundle, gate="off")
    return bundle, files


@contextmanager
def serve_ours(bundle: Path, threads: int) -> Iterator[Engine]:
    """Runs `edgelora serve` on a free port."""
    command = [sys.executable, "-m", "edgelora", "serve", str(bundle), "--port", "0", "--threads", str(threads), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        url = json.loads(process.stdout.readline())["url"]
        yield Engine(url, process, [{"model": f"a{index}:1"} for index in range(max(VARIANTS))])
    finally:
        process.terminate()
        process.wait(timeout=60)


@contextmanager
def serve_peer(binary: Path, gguf: Path, adapters: Mapping[str, Path], threads: int) -> Iterator[Engine]:
    """Runs llama-server with slots and all adapters, of which each request applies one."""
    with serve_llama(binary, gguf, adapters, threads, 2048 * SLOTS, slots=SLOTS) as server:
        scales = [[{"id": index, "scale": float(index == one)} for index in range(len(adapters))] for one in range(len(adapters))]
        yield Engine(server.url, server.process, [{"lora": scale} for scale in scales])


async def run_clients(engine: Engine, load: Load) -> Measurement:
    """Lets the clients ask one request after another, client by client on another variant."""
    first_tokens: list[float] = []
    written = 0

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        nonlocal written
        for request in range(load.requests):
            words = " ".join(WORDS[(number * 5 + request * 3 + place * place) % len(WORDS)] for place in range(load.words))
            body = {
                "prompt": f"{load.seed}.{number}.{request}: a story of {words}.",
                "max_tokens": load.tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                **engine.choices[number % load.variants],
            }
            started, first = time.perf_counter(), None
            async with client.stream("POST", f"{engine.url}/v1/completions", json=body) as answer:
                assert answer.status_code == 200, await answer.aread()
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if first is None and event["choices"] and event["choices"][0].get("text"):
                        first = time.perf_counter() - started
                    if event.get("usage"):
                        written += event["usage"]["completion_tokens"]
            first_tokens.append(time.perf_counter() - started if first is None else first)

    cpu, started = read_cpu_seconds(engine.process.pid), time.perf_counter()
    # llama-server ends idle connections, so each request has its own.
    limits = httpx.Limits(max_connections=load.clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        await asyncio.gather(*(ask(client, number) for number in range(load.clients)))
    seconds = time.perf_counter() - started
    expected = load.clients * load.requests * load.tokens
    if written != expected:
        raise RuntimeError(f"{written} of {expected} tokens: no fair round")
    ranked = sorted(first_tokens)
    return Measurement(
        written / seconds,
        ranked[min(len(ranked) - 1, int(0.95 * len(ranked)))],
        (read_cpu_seconds(engine.process.pid) - cpu) / written,
    )


def read_cpu_seconds(pid: int) -> float:
    """Returns the CPU seconds of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def list_records(found: Mapping[tuple[int, int, str], Sequence[Measurement]], least: int) -> list[dict[str, Any]]:
    """Lists the medians by variants, clients and engine. least: the number of clients with which each speed is compared."""
    records: list[dict[str, Any]] = []
    for (variants, clients, name), measured in found.items():
        speed, first, cpu = (statistics.median(getattr(each, field) for each in measured) for field in vars(measured[0]))
        alone = found[variants, least, name]
        gain = statistics.median(each.speed / one.speed for each, one in zip(measured, alone, strict=True))
        record = {"variants": variants, "clients": clients, "engine": name, "tokens_per_second": speed}
        record |= {"p95_first_token_seconds": first, "cpu_seconds_per_token": cpu, "over_least": gain}
        if name == OURS and (peer := found.get((variants, clients, PEER))):
            record |= {"ratios": sorted(ours.speed / theirs.speed for ours, theirs in zip(measured, peer, strict=True))}
        records.append(record)
    return records


def show(shape: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Prints the records as a table."""
    rows = []
    for record in records:
        ratios = record.get("ratios")
        rows.append(
            [
                *(str(record[name]) for name in ("variants", "clients", "engine")),
                f"{record['tokens_per_second']:.1f}",
                f"{record['over_least']:.2f}",
                f"{record['p95_first_token_seconds']:.2f}",
                f"{1e3 * record['cpu_seconds_per_token']:.1f}",
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})" if ratios else "",
            ]
        )
    columns = ["variants", "clients", "engine", "tokens/s", "× fewest", "p95 first token, s", "CPU ms/token", "ours/theirs"]
    print_table(f"{shape}, live adapters: many clients", columns, rows)


if __name__ == "__main__":
    main()
