"""Memory and time of an export at a real model's shape, next to onnxruntime-genai's builder.

    make test                                                              # sets up .venv
    .venv/bin/python -m benchmarks.export_memory --method rtn              # minutes
    .venv/bin/python -m benchmarks.export_memory --method gptq             # hours on two cores
    .venv/bin/python -m benchmarks.export_memory --method rtn --peers-python peers/bin/python

The export is of a base and three merged variants. Weights are random (shapes.py). The three adapters have rank 16 and change only
attention. Memory is anonymous memory (RssAnon in /proc, so Linux only) of the exporting process and its children, sampled 50
times per second. Pages of mapped files do not count, as the system can drop them. The builder makes one model, from the unchanged
checkpoint: each variant would need a merged checkpoint and the same time again.
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
from benchmarks.workers import default_cache, report
from edgelora.cli.terminal import print_json, print_table
from edgelora.inspection import describe_bundle
from edgelora.peers.worker import last_line
from edgelora_runtime import Bundle
from edgelora_runtime.residency.memory import find_anonymous_memory

ADAPTERS = ("first", "second", "third")
METHODS = ("rtn", "gptq")
PEER = "onnxruntime-genai, one model"
TEXTS = 400  # of up to 512 tokens: more than GPTQ uses
INTERVAL = 0.02  # seconds between samples
MIB = 2**20


@dataclass(frozen=True)
class Figures:
    """The cost of one export.

    variant_share: bytes that only one merged variant maps, over the base variant's bytes. It is the largest, or None without
    merged variants. merged, live: how many variants with an adapter ended merged or live, as the gate can turn merged ones live.
    They are None for the peer.
    """

    peak_bytes: int
    seconds: float
    variant_share: float | None = None
    merged: int | None = None
    live: int | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="number of layers to use; all if omitted")
    parser.add_argument("--method", choices=METHODS, action="append", help="repeatable; rtn if omitted")
    parser.add_argument("--peers-python", type=Path, help="Python interpreter with benchmarks/peers.txt installed")
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
    """Writes the checkpoint, three adapters and calibration texts, if they are missing."""
    checkpoint = write_checkpoint(shape, cache)
    for seed, name in enumerate(ADAPTERS):
        write_adapter(shape, checkpoint, adapter_folder(cache, name), ATTENTION, rank=16, seed=seed)
    write_texts(shape, cache / "texts.jsonl", TEXTS)


def adapter_folder(cache: Path, name: str) -> Path:
    return cache / f"{name}-{ADAPTER_SIZE}"


def measure_export(cache: Path, method: str) -> Figures:
    """Exports a base and a merged variant per adapter through the command line."""
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
    """Runs onnxruntime-genai's builder on the bare checkpoint."""
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [str(python), "-m", "benchmarks.peer_models", "genai", str(cache / "checkpoint"), str(Path(folder) / "model")]
        report("exporting with onnxruntime-genai")
        return watch(command)


def watch(command: list[str]) -> Figures:
    """Runs a command and samples its memory.

    If it fails, exits with the end of its output.
    """
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peak = max(
                peak, sum(find_anonymous_memory(pid) or 0 for pid in family(process.pid))
            )  # gone once the process has ended
            time.sleep(INTERVAL)
        seconds = time.perf_counter() - start
        if process.returncode != 0:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} ended with status {process.returncode}: {last_line(errors.read())}")
    return Figures(peak, seconds)


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for parent in found:  # grows during the loop
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # ended in the meantime
                continue
    return found


if __name__ == "__main__":
    main()
