"""Time and memory of composing adapters at a real model's shape.

    make test                                                          # sets up .venv
    .venv/bin/python -m benchmarks.compose_speed
    .venv/bin/python -m benchmarks.compose_speed --method linear --method ties --rounds 1 --without-twins

Adapters are random (shapes.py), on every linear layer. Each method composes the whole model into an adapter of the summed rank,
through the command line, reading and writing included. Methods are interleaved: each round runs every method once. Memory is the
process's anonymous memory, as in export_memory.py. Core-space methods are also compared with their full-space twins. The twins
need SVDs of whole ΔW, so they are timed on one module per shape, and scaled by the number of modules of that shape. Both sides of
that comparison start with their inputs in memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.export_memory import MIB, watch
from benchmarks.shapes import ALL_LINEAR, SHAPES, Shape, write_adapter
from benchmarks.workers import default_cache, report
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.machine import OtherWork, describe_machine
from edgelora.mix.methods import MIX_METHODS
from edgelora.peers.comparison import Ratio

if TYPE_CHECKING:
    from edgelora.mix.methods.deltas import Factors

TWINS = {"core_tsv": "tsv", "core_iso": "iso_c"}  # a method on factors, and the same on whole deltas
WEIGHTS = (0.5, 0.6, -0.3, 0.4, 0.7, -0.2)


@dataclass(frozen=True)
class Figures:
    """The cost of composing the whole model with one method.

    It is seconds per round, and peak anonymous memory.
    """

    seconds: tuple[float, ...]
    peak_bytes: int


@dataclass(frozen=True)
class Comparison:
    """A method on factors and its twin on whole deltas.

    Seconds are medians for the whole model, and ratio is the twin's over ours. difference: largest relative difference of the two
    results over the modules.
    """

    seconds: float
    twin_seconds: float
    ratio: Ratio
    difference: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="number of layers to use; all if omitted")
    parser.add_argument("--adapters", type=int, choices=range(1, len(WEIGHTS) + 1), default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    methods = [name for name in MIX_METHODS if name not in TWINS.values()]
    parser.add_argument("--method", choices=methods, action="append", help="repeatable; all except the twins if omitted")
    parser.add_argument("--without-twins", action="store_true", help="skip the comparison, which takes minutes per round")
    parser.add_argument("--output", type=Path, default=default_cache(), help="folder for the adapters")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers:
        shape = replace(shape, name=f"{shape.name}-{arguments.layers}-layers", layers=arguments.layers)
    other = OtherWork([])
    adapters = write_adapters(shape, arguments.output / shape.name, arguments.adapters, arguments.rank)
    composed = measure_composing(adapters, arguments.method or methods, arguments.rounds)
    compared = {} if arguments.without_twins else compare_twins(shape, arguments.adapters, arguments.rank, arguments.rounds)
    if arguments.json:
        print_json(
            {
                "shape": shape.name,
                "adapters": arguments.adapters,
                "rank": arguments.rank,
                "machine": describe_machine(),
                "methods": {name: asdict(figures) for name, figures in composed.items()},
                "twins": {name: asdict(comparison) for name, comparison in compared.items()},
            }
        )
        return
    if (share := other.share()) is not None:
        print_note(f"other programs took {share:.0%} of the CPU")
    rows = [
        [name, f"{statistics.median(found.seconds):.1f}", f"{min(found.seconds):.1f}–{max(found.seconds):.1f}", _mib(found)]
        for name, found in composed.items()
    ]
    title = f"{shape.name}, {arguments.adapters} random adapters of rank {arguments.rank} on every linear layer, to one adapter"
    print_table(title, ["method", "seconds, median", "least–greatest", "peak MiB"], rows)
    if compared:
        pairs = [
            [f"{name} | {TWINS[name]}", f"{c.seconds:.2f}", f"{c.twin_seconds:.0f}", str(c.ratio), f"{c.difference:.1e}"]
            for name, c in compared.items()
        ]
        title = "only the merge, timed on one module of each shape and scaled to the model, medians"
        columns = ["core space | full space", "seconds", "twin's", "ratio (least–greatest)", "difference"]
        print_table(title, columns, pairs)


def write_adapters(shape: Shape, cache: Path, count: int, rank: int) -> list[Path]:
    """Writes random adapters of a checkpoint that does not exist. Nothing reads it."""
    report(f"writing {count} adapters of {shape.name}")
    cache.mkdir(parents=True, exist_ok=True)
    folders = [cache / f"all-linear-{rank}-{seed}" for seed in range(count)]
    for seed, folder in enumerate(folders):
        write_adapter(shape, cache / "checkpoint", folder, ALL_LINEAR, rank=rank, seed=seed)
    return folders


def measure_composing(adapters: list[Path], methods: list[str], rounds: int) -> dict[str, Figures]:
    """Composes the whole model with each method, interleaved."""
    found: dict[str, list[tuple[float, int]]] = {}
    for turn in range(rounds):
        for method in methods:
            report(f"round {turn + 1} of {rounds}: {method}")
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "edgelora", "compose", "--method", method, "--output", str(Path(folder) / "m")]
                for index, (adapter, weight) in enumerate(zip(adapters, WEIGHTS, strict=False)):
                    command += ["--adapter", f"a{index}={adapter}:{weight}"]
                watched = watch(command)
            found.setdefault(method, []).append((watched.seconds, watched.peak_bytes))
    return {
        name: Figures(tuple(seconds for seconds, _ in taken), max(peak for _, peak in taken)) for name, taken in found.items()
    }


def compare_twins(shape: Shape, count: int, rank: int, rounds: int) -> dict[str, Comparison]:
    """Compares methods on factors with their twins on deltas, interleaved, per module shape."""
    sizes = Counter(size for name, size in shape.tensors() if name.removesuffix(".weight").endswith(ALL_LINEAR))
    weights = WEIGHTS[:count]
    ours, theirs = ({name: [0.0] * rounds for name in TWINS} for _ in range(2))
    differences = dict.fromkeys(TWINS, 0.0)
    for turn in range(rounds):
        for (rows, columns), modules in sizes.items():
            factors = draw_factors(rows, columns, count, rank, turn)
            deltas = [b @ a for a, b in factors]
            for name, twin in TWINS.items():
                merge, merge_whole = MIX_METHODS[name].factored, MIX_METHODS[twin].dense
                assert merge is not None and merge_whole is not None
                report(f"round {turn + 1} of {rounds}: {name} and {twin} on {rows}x{columns}")
                start = time.perf_counter()
                a, b = merge(factors, weights)
                between = time.perf_counter()
                whole = merge_whole(deltas, weights)
                ours[name][turn] += modules * (between - start)
                theirs[name][turn] += modules * (time.perf_counter() - between)
                difference = float(np.linalg.norm(b @ a - whole) / np.linalg.norm(whole))
                differences[name] = max(differences[name], difference)
    return {
        name: Comparison(
            statistics.median(ours[name]),
            statistics.median(theirs[name]),
            _ratio([theirs[name][turn] / ours[name][turn] for turn in range(rounds)]),
            differences[name],
        )
        for name in TWINS
    }


def draw_factors(rows: int, columns: int, count: int, rank: int, seed: int) -> list[Factors]:
    """Random A (rank, columns) and B (rows, rank) of several adapters."""
    random = np.random.default_rng(seed)
    shapes = ((rank, columns), (rows, rank))
    return [tuple(random.standard_normal(size, np.float32) for size in shapes) for _ in range(count)]  # type: ignore[misc]


def _ratio(values: list[float]) -> Ratio:
    return Ratio(statistics.median(values), min(values), max(values))


def _mib(figures: Figures) -> str:
    return f"{figures.peak_bytes / MIB:.0f}"


if __name__ == "__main__":
    main()
