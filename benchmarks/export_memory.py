"""Memory and time of an export at a real model's shape: a base and three merged variants, next to onnxruntime-genai's builder.

    make test                                                              # sets up .venv
    .venv/bin/python -m benchmarks.export_memory --method rtn              # minutes
    .venv/bin/python -m benchmarks.export_memory --method gptq             # hours on two cores
    .venv/bin/python -m benchmarks.export_memory --method rtn --peers-python peers/bin/python

Weights are random (shapes.py); the three adapters change attention only, rank 16. Memory is anonymous memory (RssAnon in
/proc, so Linux only) of the exporting process and its children, sampled 50 times a second: pages of mapped files do not count,
they can be dropped. The builder makes one model, from the checkpoint as it is: each variant takes it as long again, and a
merged checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.shapes import ADAPTER_SIZE, ATTENTION, SHAPES, Shape, write_adapter, write_checkpoint, write_texts
from benchmarks.workers import default_cache, last_line, report
from edgelora.cli.terminal import print_json, print_table
from edgelora.inspection import describe_bundle
from edgelora_runtime import Bundle
from edgelora_runtime.residency.memory import find_anonymous_memory

ADAPTERS = ("first", "second", "third")
METHODS = ("rtn", "gptq")
PEER = "onnxruntime-genai, one model"
TEXTS = 400  # of up to 512 tokens: more than GPTQ asks for
INTERVAL = 0.02  # seconds between two looks at the memory
MIB = 2**20


@dataclass(frozen=True)
class Figures:
    """What one export took.

    variant_share: bytes of a merged variant that no other maps, over the base variant's; the largest, None without one. merged,
    live: how many of the variants with an adapter ended as what, as the gate can turn merged ones live; None for the peer.
    """

    peak_bytes: int
    seconds: float
    variant_share: float | None = None
    merged: int | None = None
    live: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="only so many layers of the shape")
    parser.add_argument("--method", choices=METHODS, action="append", help="repeatable; rtn without it")
    parser.add_argument("--peers-python", type=Path, help="interpreter of the environment of benchmarks/peers.txt")
    parser.add_argument("--output", type=Path, default=default_cache(), help="folder for checkpoints and adapters")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers:
        shape = replace(shape, name=f"{shape.name}-{arguments.layers}-layers", layers=arguments.layers)
    cache = arguments.output / shape.name
    report(f"writing {shape.name}, random weights")
    write_inputs(shape, cache)
    found = {method: measure_export(cache, method) for method in arguments.method or METHODS[:1]}
    if arguments.peers_python:
        found[PEER] = measure_builder(cache, arguments.peers_python)
    if arguments.json:
        print_json({name: asdict(figures) for name, figures in found.items()})
        return
    rows = [
        [
            name,
            f"{figures.peak_bytes / MIB:.0f}",
            f"{figures.seconds:.0f}",
            "" if figures.variant_share is None else f"{figures.variant_share:.1%}",
            "" if figures.merged is None else f"{figures.merged} / {figures.live}",
        ]
        for name, figures in found.items()
    ]
    columns = ["exporter", "peak MiB", "seconds", "largest merged variant adds", "merged / live"]
    print_table(f"export of {shape.name}, random weights", columns, rows)


def write_inputs(shape: Shape, cache: Path) -> None:
    """The checkpoint, three adapters and texts to calibrate on, where they are missing."""
    checkpoint = write_checkpoint(shape, cache)
    for seed, name in enumerate(ADAPTERS):
        write_adapter(shape, checkpoint, adapter_folder(cache, name), ATTENTION, rank=16, seed=seed)
    write_texts(shape, cache / "texts.jsonl", TEXTS)


def adapter_folder(cache: Path, name: str) -> Path:
    return cache / f"{name}-{ADAPTER_SIZE}"


def measure_export(cache: Path, method: str) -> Figures:
    """A base and a merged variant per adapter, exported by the command line."""
    recipe = [f"base = {json.dumps(str(cache / 'checkpoint'))}", "[adapters]"]
    recipe += [f"{name} = {json.dumps(str(adapter_folder(cache, name)))}" for name in ADAPTERS]
    recipe += ["[quantization]", "bits = 4", "block_size = 32", f'method = "{method}"']
    recipe += ["[variants.base]", "mix = {}"]
    for name in ADAPTERS:
        recipe += [f"[variants.{name}]", f"mix = {{ {name} = 1.0 }}"]
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        path, bundle = Path(folder) / "recipe.toml", Path(folder) / "bundle"
        path.write_text("\n".join(recipe) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "edgelora", "export", str(path), "--output", str(bundle)]
        command += ["--calibration", str(cache / "texts.jsonl")] if method == "gptq" else ["--gate", "off"]
        report(f"exporting with {method}")
        figures = watch(command)
        variants = {variant.name: variant for variant in describe_bundle(Bundle.open(bundle)).variants}
    merged = [variants[name] for name in ADAPTERS if variants[name].kind == "merged"]
    added = max((variant.private_bytes / variants["base"].bytes for variant in merged), default=None)
    return replace(figures, variant_share=added, merged=len(merged), live=len(ADAPTERS) - len(merged))


def measure_builder(cache: Path, python: Path) -> Figures:
    """onnxruntime-genai's builder, on the checkpoint alone."""
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [str(python), "-m", "benchmarks.peer_models", "genai", str(cache / "checkpoint"), str(Path(folder) / "model")]
        report("exporting with onnxruntime-genai")
        return watch(command)


def watch(command: list[str]) -> Figures:
    """Runs a command to its end, looking at its memory; exits with its last words if it fails."""
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peak = max(peak, sum(find_anonymous_memory(pid) or 0 for pid in family(process.pid)))  # none once it has ended
            time.sleep(INTERVAL)
        seconds = time.perf_counter() - start
        if process.returncode != 0:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} ended with status {process.returncode}: {last_line(errors.read())}")
    return Figures(peak, seconds)


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:  # grows while it is walked
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # ended meanwhile
                continue
    return found


if __name__ == "__main__":
    main()
