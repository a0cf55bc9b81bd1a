"""The cost of a live adapter per token, relative to a merged one.

    make test                                                          # sets up .venv
    .venv/bin/python -m benchmarks.live --shape llama-3.2-1b
    .venv/bin/python -m benchmarks.live --shape smollm2-135m

Figures are decode and prefill times of a live variant over a merged one's. Weights are random (shapes.py), int4 in blocks of 32.
The adapter has rank 16 on every linear layer of the decoder. A merged variant runs the same products as the bare base with other
codes, so the bare base represents it. Both variants are open in one process and interleaved, with a new prompt each round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from benchmarks.shapes import ALL_LINEAR, SHAPES, Shape, random_prompt, write_adapter, write_checkpoint
from benchmarks.workers import default_cache, report
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora.machine import OtherWork, describe_machine
from edgelora.peers.comparison import REST, WARM_UP, Ratio
from edgelora_export.plan.variants import Quantization
from edgelora_runtime import Runtime

MERGED, LIVE = "base", "tuned"
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128, help="length in tokens")
    parser.add_argument("--tokens", type=int, default=64, help="single-token passes to time")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--output", type=Path, default=default_cache(), help="folder for the checkpoint, the adapter and the bundle"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    bundle = export_bundle(shape, arguments.output / shape.name, arguments.rank)
    other = OtherWork([])
    with Runtime(bundle, threads=arguments.threads) as runtime:
        seconds = measure(runtime, shape, arguments.rounds, arguments.prompt, arguments.tokens)
    ratios = {phase: compare(by_variant) for phase, by_variant in seconds.items()}
    medians = {phase: {name: statistics.median(values) for name, values in by.items()} for phase, by in seconds.items()}
    if arguments.json:
        print_json(
            {"shape": shape.name, "rank": arguments.rank, "machine": describe_machine(), "seconds": medians, "ratios": ratios}
        )
        return
    if (share := other.share()) is not None:
        print_note(f"other programs took {share:.0%} of the CPU")
    rows = [[phase, *(f"{1e3 * medians[phase][name]:.2f}" for name in (MERGED, LIVE)), str(ratios[phase])] for phase in ratios]
    title = f"{shape.name}, random weights, rank {arguments.rank} on every linear layer: milliseconds, and live over merged"
    print_table(title, ["", "merged", "live", "ratio (least–greatest)"], rows)


def export_bundle(shape: Shape, cache: Path, rank: int) -> Path:
    """Exports a bundle of the base and one live variant, rounded to nearest."""
    report(f"writing {shape.name}, random weights")
    checkpoint = write_checkpoint(shape, cache)
    adapter = write_adapter(shape, checkpoint, cache / f"all-linear-{rank}", ALL_LINEAR, rank=rank, seed=0)
    variants = {MERGED: VariantRecipe({}), LIVE: VariantRecipe({LIVE: 1.0}, kind="live")}
    report("exporting")
    bundle = cache / "live-bundle"
    export(Recipe(str(checkpoint), {LIVE: adapter}, variants, Quantization(method="rtn")), bundle, gate="off")
    return bundle


def measure(runtime: Runtime, shape: Shape, rounds: int, prompt: int, tokens: int) -> dict[str, dict[str, list[float]]]:
    """Measures seconds by phase and variant, one value per round.

    The phases are prefill of the whole prompt, and decode per token.
    """
    found: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode, per token": {}}
    for turn in range(rounds + 1):
        for name in (MERGED, LIVE):
            time.sleep(REST)
            tuned = runtime.generate(
                random_prompt(shape, prompt, turn), variant=name, max_tokens=1 + (tokens if turn else WARM_UP)
            )
            assert not tuned.reused_tokens
            if turn:
                found["prefill"].setdefault(name, []).append(tuned.prefill_ms / 1e3)
                found["decode, per token"].setdefault(name, []).append(tuned.decode_ms / 1e3 / (len(tuned.tokens) - 1))
    return found


def compare(seconds: dict[str, list[float]]) -> Ratio:
    """Live over merged, round by round."""
    ratios = [live / merged for live, merged in zip(seconds[LIVE], seconds[MERGED], strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


if __name__ == "__main__":
    main()
