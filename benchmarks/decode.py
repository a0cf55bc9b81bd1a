"""Prefill and decode speed at a real model's shape, against onnxruntime-genai and llama.cpp.

    python -m venv peers && peers/bin/pip install -r benchmarks/peers.txt
    python -m benchmarks.decode --shape llama-3.2-1b --peers-python peers/bin/python
    python -m benchmarks.decode --shape llama-3.2-1b --peers-python peers/bin/python --check    # same model?

All engines run on the same machine, and get the same checkpoint of random weights (shapes.py), quantized to int4 in blocks of 32
by each engine's own tool (peer_models.py). --block-size changes ours, for speed only, as the weights lie on the grid of 32. Runs
are interleaved (A B C A B C), each engine in its own process, idle in between. Each round has a new prompt, so no prompt cache
helps. `llama.cpp` is the result of `llama-quantize` with Q4_0, whose tied head has 6 or 8 bits. `llama.cpp-pure` has a 4-bit
head, like the others. Loading is from a warm page cache. The share of memory bandwidth is that of our weights: each decoded token
reads all of them once, the tied embedding as the head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.shapes import SHAPES, random_prompt, write_checkpoint
from benchmarks.workers import (
    CACHE_VERSION,
    OURS,
    PEERS,
    REFERENCE,
    OtherWork,
    UnavailableError,
    count_cores,
    default_cache,
    describe_machine,
    report,
    start_workers,
)
from edgelora_runtime import Bundle

if TYPE_CHECKING:
    from benchmarks.workers import Worker

REST = 0.2  # seconds before each run, so that the previous engine's threads stop spinning
WARM_UP = 16  # single-token passes before the first timed round
BANDWIDTH_BYTES = 1 << 28  # read by each thread
NOISE = 0.05  # share of the CPU used by other programs above which the table warns
SAME_MODEL = 0.98  # minimum correlation of logits: int8 activations cost thousandths, wrongly ordered rows leave 0.1


@dataclass
class Figures:
    """One engine's speeds in tokens per second, one value per round."""

    version: str
    settings: str
    load_seconds: float
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ratio:
    """Ours over a peer's, round by round."""

    median: float
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}–{self.greatest:.2f})"


@dataclass(frozen=True)
class Report:
    """The result of a run. Its fields are those of the JSON output."""

    shape: str
    block_size: int  # of ours
    prompt: int
    tokens: int
    threads: int
    rounds: int
    machine: dict[str, Any]
    other_work: float | None  # share of the CPU that other programs took, between 0 and 1
    bandwidth: float  # bytes per second that the threads read from memory, median over rounds
    bandwidth_share: float | None  # share that our decode reads; None without ours
    engines: dict[str, Figures]
    ratios: dict[str, dict[str, Ratio]]  # by peer, then prefill and decode
    missing: dict[str, str]


def measure(workers: dict[str, Worker], prompts: list[list[int]], tokens: int, threads: int) -> tuple[dict[str, Figures], float]:
    """Runs a warm-up with the first prompt, then a round per further prompt.

    Each round is over all engines. Also measures memory bandwidth.
    """
    figures: dict[str, Figures] = {}
    for name, worker in workers.items():
        warm = worker.ask(verb="warm", prompt=prompts[0], tokens=WARM_UP)
        figures[name] = Figures(worker.version, warm["settings"], worker.load_seconds)
    bandwidths = []
    for turn, prompt in enumerate(prompts[1:], 1):
        bandwidths.append(measure_bandwidth(threads))
        report(f"round {turn} of {len(prompts) - 1}")
        for name, worker in workers.items():
            time.sleep(REST)
            result = worker.ask(verb="round", prompt=prompt, tokens=tokens)
            figures[name].prefill.append(len(prompt) / result["prefill_seconds"])
            figures[name].decode.append(tokens / result["decode_seconds"])
    return figures, statistics.median(bandwidths)


def measure_bandwidth(threads: int) -> float:
    """Measures bytes per second that `threads` threads together read, best of five.

    They read from arrays too large for any cache.
    """
    arrays = [np.ones(BANDWIDTH_BYTES // 8, np.int64) for _ in range(threads)]
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.max, arrays))  # numpy releases the GIL
            seconds.append(time.perf_counter() - start)
    return threads * BANDWIDTH_BYTES / min(seconds)


def count_weight_bytes(bundle: Path) -> int:
    """Bytes of the blobs of a bundle's only variant."""
    manifest = Bundle.open(bundle).manifest
    return sum(manifest.blob_bytes(manifest.variants[manifest.default_variant].graphs["cpu"]).values())


def compare(figures: dict[str, Figures]) -> dict[str, dict[str, Ratio]]:
    """Ours over each peer's."""
    ratios: dict[str, dict[str, Ratio]] = {}
    if OURS not in figures:
        return ratios
    for name, peer in figures.items():
        if name != OURS:
            ours = figures[OURS]
            pairs = {"prefill": (ours.prefill, peer.prefill), "decode": (ours.decode, peer.decode)}
            values = {phase: [a / b for a, b in zip(*pair, strict=True)] for phase, pair in pairs.items()}
            ratios[name] = {phase: Ratio(statistics.median(v), min(v), max(v)) for phase, v in values.items()}
    return ratios


def format_table(found: Report) -> str:
    """Prints the report as tables."""
    machine = found.machine
    lines = [
        f"{found.shape}, int4 in blocks of 32, ours of {found.block_size}: prompt {found.prompt}, decode {found.tokens} tokens, "
        f"{found.threads} threads, median of {found.rounds} rounds",
        f"{machine['cpu']}, {machine['physical_cores']} cores, {machine['system']}, Python {machine['python']}",
    ]
    if found.other_work is not None:
        warning = ": do not trust these figures" if found.other_work > NOISE else ""
        lines.append(f"other programs took {found.other_work:.0%} of the CPU{warning}")
    if found.bandwidth_share is not None:
        lines.append(
            f"memory is read at {found.bandwidth / 1e9:.1f} GB/s; our decode reads weights at {found.bandwidth_share:.0%} of that"
        )
    lines += ["", f"{'':20}{'load s':>8}{'prefill tok/s':>15}{'decode tok/s':>15}   version"]
    for name, figures in found.engines.items():
        speeds = f"{statistics.median(figures.prefill):15.1f}{statistics.median(figures.decode):15.1f}"
        lines.append(f"{name:20}{figures.load_seconds:8.2f}{speeds}   {figures.version}")
    lines += [f"{name:20}{reason}" for name, reason in found.missing.items()]
    if found.ratios:
        lines += ["", f"{f'{OURS} /':20}{'prefill (min–max)':>23}{'decode (min–max)':>23}"]
    for name, phases in found.ratios.items():
        lines.append(f"{name:20}" + "".join(f"{phase!s:>23}" for phase in phases.values()))
    lines += ["", *(f"{name}: {figures.settings}" for name, figures in found.engines.items())]
    return "\n".join(lines)


def check_models(workers: dict[str, Worker], prompt: list[int]) -> dict[str, float]:
    """Correlates each engine's logits after the prompt with those of transformers.

    The reference is in fp32, unquantized. Empty without it.
    """
    if REFERENCE not in workers:
        return {}
    logits = {name: np.array(worker.ask(verb="logits", prompt=prompt)["logits"]) for name, worker in workers.items()}
    reference = logits.pop(REFERENCE)
    return {name: float(np.corrcoef(reference, values)[0, 1]) for name, values in logits.items()}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--engines", nargs="+", choices=[OURS, *PEERS], default=[OURS, *PEERS], metavar="ENGINE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="length in tokens")
    parser.add_argument("--tokens", type=int, default=64, help="single-token passes to time")
    parser.add_argument("--block-size", type=int, default=32, help="block size of our quantization; peers use 32")
    parser.add_argument("--threads", type=int, default=count_cores(), help="default: physical cores")
    parser.add_argument("--peers-python", default=sys.executable, help="Python interpreter with the peers installed")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for models, several GB")
    parser.add_argument("--check", action="store_true", help="compare logits with transformers instead of measuring speed")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    return parser.parse_args()


def main() -> int:
    """Measures or checks, and prints. Returns 1 if a check fails."""
    arguments = parse_arguments()
    shape = SHAPES[arguments.shape]
    cache = arguments.cache.resolve() / f"v{CACHE_VERSION}" / shape.name
    write_checkpoint(shape, cache)
    length = -(-(arguments.prompt + arguments.tokens + 1) // 256) * 256  # llama.cpp rounds up to a multiple of 256
    prompts = [random_prompt(shape, arguments.prompt, seed) for seed in range(arguments.rounds + 1)]
    names = [*arguments.engines, REFERENCE] if arguments.check else arguments.engines
    workers, missing = start_workers(names, cache, arguments.peers_python, arguments.threads, length, arguments.block_size)
    passed = True
    try:
        if arguments.check:
            correlation = check_models(workers, prompts[0])
            passed = min(correlation.values(), default=0.0) >= SAME_MODEL
            result: dict[str, Any] = {"shape": shape.name, "correlation": correlation, "missing": missing}
            lines = [f"{name:20}{value:.4f}" for name, value in correlation.items()]
            lines += [f"{name:20}{reason}" for name, reason in missing.items()]
            text = "\n".join([f"{shape.name}: correlation of logits with transformers in fp32", *lines])
        else:
            other = OtherWork(workers)
            figures, bandwidth = measure(workers, prompts, arguments.tokens, arguments.threads)
            share = None
            if OURS in figures:
                share = statistics.median(figures[OURS].decode) * count_weight_bytes(cache / "bundle") / bandwidth
            found = Report(
                shape.name,
                arguments.block_size,
                arguments.prompt,
                arguments.tokens,
                arguments.threads,
                arguments.rounds,
                describe_machine(),
                other.share(),
                bandwidth,
                share,
                figures,
                compare(figures),
                missing,
            )
            result, text = asdict(found), format_table(found)
    except UnavailableError as reason:  # the engine loaded but cannot run
        print(reason, file=sys.stderr)
        return 1
    finally:
        for worker in workers.values():
            worker.close()
    print(text, file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(result))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
