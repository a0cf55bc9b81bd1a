"""The cost of switching at a real model's shape, in time and memory.

    python -m benchmarks.switching --shape llama-3.2-1b --peers-python peers/bin/python    # peers: see decode.py

The peers' cost is that of loading a model in llama.cpp and onnxruntime-genai. Weights are random: a base, merged variants that
differ in their attention, and eight live adapters on every linear layer. Cold: the variant is unloaded, its files are in the
system's page cache, and either no variant is loaded or another one is. For both, peers must reload their model, in a process that
has loaded it before. All engines are interleaved. A cached context is one that the variant read before others ran. Memory is what
the process holds after one token, without keys and values.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.shapes import ALL_LINEAR, ATTENTION, SHAPES, Shape, random_prompt, write_adapter, write_checkpoint
from benchmarks.workers import CACHE_VERSION, PEERS, default_cache, report, start_workers
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora.machine import OtherWork, count_cores, describe_machine
from edgelora.peers.models import list_files, read_once
from edgelora_export.plan.variants import Quantization
from edgelora_runtime import Bundle, PackedCache, Runtime
from edgelora_runtime.residency.memory import find_anonymous_memory
from edgelora_runtime.session.kernels import KERNELS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora.peers.worker import Worker


MERGED = ("base", "merged1", "merged2", "merged3")
LIVE = tuple(f"live{number}" for number in range(1, 9))
CONTEXT, STEPS = 500, 16  # tokens of the cached context, and single-token passes to average a decode step over
RETURNS = 5  # switches to a cached context, each after another variant ran


@dataclass
class Figures:
    """Milliseconds, one value per round and variant.

    cold: by loader: plain (edgelora), packed (with a packed cache), the peers. beside: the same while another merged variant is
    loaded. steps: time to the first token after a cached context, over that of a decode step.
    """

    warm: list[float] = field(default_factory=list)
    live: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    cold: dict[str, list[float]] = field(default_factory=dict)
    beside: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Memory of variants: the process's anonymous memory, and the weights that it maps.

    merged: the own memory of a further merged variant, over its weights. live: the memory of eight live variants over that of
    one. Each without and with a packed cache. Mapped files of factors do not count.
    """

    merged: tuple[float, float]
    live: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=count_cores(), help="default: physical cores")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="kernels of edgelora to use; its own pack nothing")
    parser.add_argument("--peers-python", default=sys.executable, help="Python interpreter with the peers installed")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for models, several GB")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    cache = arguments.cache / f"v{CACHE_VERSION}" / shape.name
    bundle = export_bundle(shape, cache)
    packed = PackedCache(arguments.cache / "packed", budget="64GiB")
    report("writing packed weights")
    with Runtime(bundle, threads=arguments.threads, kernels=arguments.kernels, packed_cache=packed) as runtime:
        report(f"kernels of {runtime.kernels}")
        for variant in (*MERGED, *LIVE):
            runtime.switch(variant)
    report("measuring memory")
    memory = measure_memory(bundle, packed, arguments.threads, arguments.kernels)
    workers, missing = start_workers(list(PEERS), cache, arguments.peers_python, arguments.threads, CONTEXT)
    other = OtherWork(worker.pid for worker in workers.values())
    figures = measure(bundle, packed, shape, arguments.threads, arguments.kernels, workers, arguments.rounds)
    share = other.share()
    for worker in workers.values():
        worker.close()
    if arguments.json:
        print_json(
            {
                "shape": shape.name,
                "machine": describe_machine(),
                "other_work": share,
                "figures": figures,
                "memory": memory,
                "missing": missing,
            }
        )
        return
    for name, reason in missing.items():
        print_note(f"{name}: {reason}")
    if share is not None:
        print_note(f"other programs took {share:.0%} of the CPU")
    show(figures, memory, shape)


def export_bundle(shape: Shape, cache: Path) -> Path:
    """Exports the base, merged and live variants, rounded to nearest."""
    report(f"writing {shape.name}, random weights")
    checkpoint = write_checkpoint(shape, cache)
    kinds = dict.fromkeys(MERGED[1:], ATTENTION) | dict.fromkeys(LIVE, ALL_LINEAR)
    adapters = {
        name: write_adapter(shape, checkpoint, cache / name, modules, rank=16, seed=seed)
        for seed, (name, modules) in enumerate(kinds.items())
    }
    variants = {MERGED[0]: VariantRecipe({})}
    variants |= {name: VariantRecipe({name: 1.0}) for name in MERGED[1:]}
    variants |= {name: VariantRecipe({name: 1.0}, kind="live") for name in LIVE}
    report("exporting")
    bundle = cache / "switching-bundle"
    export(Recipe(str(checkpoint), adapters, variants, Quantization(method="rtn")), bundle, gate="off")
    return bundle


def measure_memory(bundle: Path, packed: PackedCache, threads: int, kernels: str) -> Memory:
    """Measures memory, each case in its own process.

    One-time costs of the first variant, such as onnxruntime's, do not count.
    """
    manifest = Bundle.open(bundle).manifest
    sizes = [sum(manifest.blob_bytes(manifest.variants[name].graphs["cpu"]).values()) for name in MERGED[1:]]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        merged, live = (
            [pool.submit(hold, bundle, cache, variants, threads, kernels).result() for cache in (None, packed)]
            for variants in (MERGED, LIVE)
        )
    weights = sum(manifest.blob_bytes(manifest.variants[LIVE[0]].graphs["cpu"]).values())
    shares = [
        statistics.median((b - a) / size for (a, b), size in zip(pairwise(held[1:]), sizes, strict=True)) for held in merged
    ]
    growth = [(weights + held[-1] - held[0]) / (weights + held[1] - held[0]) for held in live]
    return Memory((shares[0], shares[1]), (growth[0], growth[1]))


def hold(bundle: Path, packed: PackedCache | None, variants: Sequence[str], threads: int, kernels: str) -> list[int]:
    """Measures anonymous memory before any variant, and after each variant wrote a token.

    All previous variants stay loaded.
    """
    held = [find_anonymous_memory() or 0]
    with Runtime(bundle, threads=threads, kernels=kernels, packed_cache=packed, memory_budget="64GiB", cache_budget=0) as runtime:
        for variant in variants:
            runtime.generate([1, 2, 3], variant=variant, max_tokens=1)
            held.append(find_anonymous_memory() or 0)
    return held


def measure(
    bundle: Path, packed: PackedCache, shape: Shape, threads: int, kernels: str, workers: dict[str, Worker], rounds: int
) -> Figures:
    found = Figures()
    with (
        Runtime(bundle, threads=threads, kernels=kernels) as plain,
        Runtime(bundle, threads=threads, kernels=kernels, packed_cache=packed, memory_budget="64GiB") as mapped,
    ):
        for turn in range(rounds):
            report(f"round {turn + 1} of {rounds}")
            for name, runtime in (("plain", plain), ("packed", mapped)):
                runtime.close()
                read_once(list_files(bundle))
                for seconds, place in ((found.cold, turn), (found.beside, turn + 1)):
                    cold = runtime.switch(MERGED[1 + place % 3])
                    assert cold.cold
                    seconds.setdefault(name, []).append(cold.milliseconds)
            plain.close()
            for name, worker in workers.items():
                found.cold.setdefault(name, []).append(1e3 * worker.ask(verb="reload")["seconds"])
            measure_warm(mapped, shape, turn, found)
    return found


def measure_warm(runtime: Runtime, shape: Shape, turn: int, found: Figures) -> None:
    """Measures switches between loaded variants, and back to their cached contexts."""
    for variant in (*MERGED, *LIVE):
        runtime.switch(variant)
    found.warm += [runtime.switch(variant).milliseconds for variant in MERGED]
    found.live += [runtime.switch(variant).milliseconds for variant in LIVE]
    prompt, other = (random_prompt(shape, CONTEXT, 2 * turn + seed) for seed in range(2))
    read = runtime.generate(prompt, variant=MERGED[1], max_tokens=1 + STEPS, ignore_eos=True)
    text = [*prompt, *read.tokens]
    for _ in range(RETURNS):
        runtime.generate(other, variant=MERGED[2], max_tokens=2, ignore_eos=True)
        again = runtime.generate(text, variant=MERGED[1], max_tokens=1, ignore_eos=True)
        assert again.reused_tokens == len(text) - 1
        found.steps.append((again.receipt.milliseconds + again.prefill_ms) / (read.decode_ms / STEPS))
        text += again.tokens


def show(figures: Figures, memory: Memory, shape: Shape) -> None:
    rows = [["warm switch", _spread(figures.warm, "ms")], ["live switch", _spread(figures.live, "ms")]]
    rows += [["first token after a cached context", _spread(figures.steps, "decode steps")]]
    rows += [[f"cold: {name}", _spread(values, "ms")] for name, values in figures.cold.items()]
    rows += [[f"cold, another is loaded: {name}", _spread(values, "ms")] for name, values in figures.beside.items()]
    for name in figures.cold.keys() - figures.beside.keys():
        for title, found in (("cold", figures.cold), ("cold, another is loaded", figures.beside)):
            ratios = [ours / peer for ours, peer in zip(found["plain"], figures.cold[name], strict=True)]
            rows.append([f"{title}: plain over {name}", _spread(ratios, "")])
    rows += [["a further merged variant over its weights, plain and packed", "{:.1%}, {:.1%}".format(*memory.merged)]]
    rows += [["eight live variants over one, plain and packed", "{:.2f}, {:.2f}".format(*memory.live)]]
    print_table(f"{shape.name}, random weights: median (least–greatest)", ["", ""], rows)


def _spread(values: list[float], unit: str) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g}) {unit}".rstrip()


if __name__ == "__main__":
    main()
