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
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.shapes import SHAPES, random_prompt, write_checkpoint
from benchmarks.workers import CACHE_VERSION, PEERS, REFERENCE, default_cache, report, start_workers
from edgelora.cli.bench import show_comparison
from edgelora.cli.terminal import print_json, print_line, print_note
from edgelora.machine import count_cores
from edgelora.peers.comparison import compare
from edgelora.peers.models import OURS
from edgelora.peers.worker import UnavailableError
from edgelora_runtime import Bundle

if TYPE_CHECKING:
    from edgelora.peers.worker import Worker

SAME_MODEL = 0.98  # minimum correlation of logits: int8 activations cost thousandths, wrongly ordered rows leave 0.1


def count_weight_bytes(bundle: Path) -> int:
    """Bytes of the blobs of a bundle's only variant."""
    manifest = Bundle.open(bundle).manifest
    return sum(manifest.blob_bytes(manifest.variants[manifest.default_variant].graphs["cpu"]).values())


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
            if arguments.json:
                print_json({"shape": shape.name, "correlation": correlation, "missing": missing})
            else:
                print_line(f"{shape.name}: correlation of logits with transformers in fp32")
                for name, value in correlation.items():
                    print_line(f"{name:20}{value:.4f}")
                for name, reason in missing.items():
                    print_line(f"{name}: {reason}")
        else:
            found = compare(
                workers,
                prompts,
                arguments.tokens,
                arguments.threads,
                weight_bytes=count_weight_bytes(cache / "bundle") if OURS in workers else None,
                missing=missing,
                on_progress=lambda done, total, what: report(f"{what} {done} of {total}"),
            )
            if arguments.json:
                print_json({"shape": shape.name, "block_size": arguments.block_size, **vars(found)})
            else:
                show_comparison(f"{shape.name}, int4 in blocks of 32, ours of {arguments.block_size}", found)
    except UnavailableError as reason:  # the engine loaded but cannot run
        print_note(str(reason))
        return 1
    finally:
        for worker in workers.values():
            worker.close()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
