"""Merge-aware training and healing: the distance from the adapter in training to its merged int4 variant, beside NF4 and GPTQ.

    make test                                                       # sets up .venv
    .venv/bin/python -m benchmarks.merge_aware --output merge-aware-run
    .venv/bin/python -m benchmarks.merge_aware --output merge-aware-run --speed      # tokens/s beside plain int4

Three arms per task and seed. "NF4, then GPTQ" is an adapter of `train` with its defaults, exported with the defaults. "healed" is
the same adapter after `train --heal`. "merge-aware" is trained with `--quant int4 --merge-aware`. Each is exported, merged, and
compared with what training computed in torch, on rows of the .test files: KL(torch ‖ onnxruntime) in nats per completion token.
The reference of the first two arms is the NF4 base with the unmerged adapter, and of the third its own forward pass. Scores are
slot F1 or exact match, and the loss per completion token, as onnxruntime runs the variant. Needs the base `pocket` and the data
(EDGELORA_MODELS, EDGELORA_DATA, or ../shared/…).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.fidelity import compare, interval, mean
from benchmarks.pocket import LEARNING_RATE, STEPS, find_base, find_data
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.data.rows import read_rows
from edgelora.evaluation import evaluate
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora.in_torch.heal import HealConfig, heal
from edgelora.in_torch.reference import load_adapted
from edgelora.in_torch.train import train
from edgelora.in_torch.train_config import TrainConfig
from edgelora_export.base.base import Base
from edgelora_export.bundle.gate import Gate
from edgelora_runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

TASKS = ("slots-buses", "sql")
ARMS = ("NF4, then GPTQ", "healed", "merge-aware")
MAX_TOKENS = 48
SPEED_STEPS, SPEED_ROUNDS = 15, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for adapters, bundles and results; all are reused")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--batch-size", type=int, default=16, help="rows per step of training")
    parser.add_argument("--heal", type=int, default=200, help="steps of healing")
    parser.add_argument("--rows", type=int, default=150, help="test rows per task")
    parser.add_argument("--speed", action="store_true", help="measure tokens/s of training instead")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.speed:
        ratios = measure_speed(arguments.output)
        print_json(ratios) if arguments.json else print_note(f"merge-aware / plain int4, rows/s: {ratios}")
        return
    results = {task: [measure(arguments, task, seed) for seed in arguments.seeds] for task in arguments.tasks}
    if arguments.json:
        print_json(results)
        return
    report(results)


def measure(arguments: argparse.Namespace, task: str, seed: int) -> dict[str, Any]:
    """Measures the arms of one task and seed, or reads what an earlier run measured."""
    folder = arguments.output / f"seed-{seed}" / task
    saved = folder / "results.json"
    if saved.exists():
        return dict(json.loads(saved.read_text()))
    base, data = find_base(), find_data()
    rows = read_rows(data / f"{task}.test.jsonl")[: arguments.rows]
    adapters = make_adapters(arguments, base, data / f"{task}.train.jsonl", folder, seed)
    bundle = folder / "bundle"
    if not bundle.exists():
        print_note(f"exporting {task}, seed {seed}")
        names = dict(zip("abc", adapters.values(), strict=True))
        variants = {name: VariantRecipe({name: 1.0}) for name in names}
        export(Recipe(str(base), names, variants, gate=Gate(policy="off")), bundle)
    found: dict[str, Any] = {}
    with Runtime(bundle) as runtime:
        for arm, variant in zip(adapters, "abc", strict=True):
            print_note(f"{task}, {arm}, seed {seed}")
            reference = adapters[ARMS[0]] if arm == "healed" else adapters[arm]
            divergence = compare(as_logits(base, reference), partial(runtime.logits, variant=variant), runtime, rows)
            scores = evaluate(runtime, rows, variant=variant, max_tokens=MAX_TOKENS)
            found[arm] = {"divergence": divergence.tolist(), "scores": asdict(scores)}
    saved.write_text(json.dumps(found))
    return found


def make_adapters(arguments: argparse.Namespace, base: Path, rows: Path, folder: Path, seed: int) -> dict[str, Path]:
    """Trains the adapters that are missing. Returns their folders by arm."""
    adapters = {arm: folder / name for arm, name in zip(ARMS, ("nf4", "healed", "merge-aware"), strict=True)}
    for arm, quant in ((ARMS[0], "nf4"), (ARMS[2], "int4")):
        if not adapters[arm].exists():
            print_note(f"training {rows.stem}, {arm}, seed {seed}")
            settings: dict[str, Any] = {
                "lr": LEARNING_RATE,
                "max_steps": arguments.steps,
                "batch_size": arguments.batch_size,
                "seed": seed,
            }
            train(TrainConfig(str(base), rows, adapters[arm], quant=quant, merge_aware=quant == "int4", **settings))
    if not adapters["healed"].exists():
        print_note(f"healing {rows.stem}, seed {seed}")
        done = heal(HealConfig(str(base), adapters[ARMS[0]], adapters["healed"], arguments.heal, seed=seed))
        print_note(f"KL {done.kl_before:.4f} → {done.kl_after:.4f} in {done.seconds:.0f} s")
    return adapters


def as_logits(base: Path, adapter: Path) -> Callable[[Sequence[int]], Any]:
    """The adapter in PEFT, as training computes with it."""
    import torch

    model = load_adapted(Base.find(str(base)), adapter, "nf4")

    def logits(tokens: Sequence[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([list(tokens)])).logits[0].float().numpy()

    return logits


def measure_speed(output: Path) -> list[float]:
    """Rows per second of merge-aware training over plain int4's, in interleaved rounds of the same steps."""
    base, rows = find_base(), find_data() / "sql.train.jsonl"
    ratios = []
    for number in range(SPEED_ROUNDS):
        seconds = {}
        for merge_aware in (False, True):
            folder = output / "speed" / f"{number}-{merge_aware}"
            settings: dict[str, Any] = {"quant": "int4", "max_steps": SPEED_STEPS, "lr": LEARNING_RATE}
            seconds[merge_aware] = train(TrainConfig(str(base), rows, folder, merge_aware=merge_aware, **settings)).seconds
        ratios.append(round(seconds[False] / seconds[True], 3))
    return ratios


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    """Prints the divergence per arm and seed, its ratio to the first arm's, and the scores."""
    generator = np.random.default_rng(0)
    table, ratios, scores = [], [], []
    for task, seeds in results.items():
        by_arm = {arm: [np.array(found[arm]["divergence"]) for found in seeds] for arm in ARMS}
        table.append([task, *(" ".join(f"{mean(rows):.5f}" for rows in by_arm[arm]) for arm in ARMS)])
        ratios.append([task, *(interval(by_arm[arm], by_arm[ARMS[0]], generator) for arm in ARMS[1:])])
        for arm in ARMS:
            each = [found[arm]["scores"] for found in seeds]
            main_scores = [one["exact_match"] if one["slot_f1"] is None else one["slot_f1"] for one in each]
            losses = [one["loss"] for one in each]
            scores.append([task, arm, *(" ".join(f"{value:.3f}" for value in values) for values in (main_scores, losses))])
    print_table("mean KL(training ‖ merged int4), nats per token, by seed", ["task", *ARMS], table)
    print_table("share of the distance of NF4, then GPTQ, 95% interval over rows", ["task", *ARMS[1:]], ratios)
    print_table("scores by seed", ["task", "arm", "F1 or exact match", "loss per token"], scores)


if __name__ == "__main__":
    main()
