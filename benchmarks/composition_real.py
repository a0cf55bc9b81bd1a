"""Composition on a real model: what mixes of chat adapters keep of each, by set, method and weight, against control arms.

    make test                                                                       # sets up .venv
    .venv/bin/python -m benchmarks.composition_real --base BASE --output real-run   # hours on two cores

Adapters for four domains of slot filling, sql, medical, math and a style are trained through the base's chat template if it has
one. Figures are the loss per completion token on test rows, and the share of rows that greedy decoding completes exactly,
normalized: (mix - base) / (adapter alone - base). Intervals are 95% bootstrap intervals over rows. Each adapter, mix and figure
is kept in --output and not made again, so a run that was stopped goes on where it was, and --stage runs a part. BASE is a folder,
GGUF file or hub id. Another base needs another --output. Needs the data (EDGELORA_DATA, or ../shared/data).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.composition_real_arms import ALONE, BASE, list_arms
from benchmarks.composition_real_data import TASKS, Plan, prepare_rows, read_tests, train_all
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.in_torch.mixed_model import IGNORED, MixedModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora.data.rows import Row

STAGES = ("alone", "pairs", "sets", "methods", "chosen", "controls", "learned")
LOSS, EXACT = "loss", "exact"
RESAMPLES = 2000

Key = tuple[str, tuple[str, ...], str, str]  # arm, its tasks, the task measured, LOSS or EXACT


class Figures:
    """The figures of one seed, as JSON lines: per arm, task and measure a numerator and a denominator of every row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[Key, list[list[float]]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            value = json.loads(line)
            self.found[value["arm"], tuple(value["tasks"]), value["task"], value["measure"]] = value["rows"]

    def add(self, key: Key, rows: list[list[float]]) -> None:
        """Appends a figure to the file."""
        self.found[key] = rows
        line = dict(zip(("arm", "tasks", "task", "measure"), key, strict=True), rows=rows)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def quotient(self, key: Key) -> float:
        """The loss or score: the quotient of the sums over rows."""
        above, below = np.sum(self.found[key], axis=0)
        return float(above / below)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="folder, GGUF file or hub id")
    parser.add_argument("--output", type=Path, required=True, help="folder for adapters, mixes and figures; reused")
    parser.add_argument("--seeds", type=int, default=3, help="trainings")
    parser.add_argument("--task", choices=TASKS, action="append", help="repeatable; all eight if omitted")
    parser.add_argument("--rows", type=int, default=24, help="test rows per task")
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--quant", default="none", help="form of the base in training")
    parser.add_argument("--stage", choices=STAGES, action="append", help="repeatable; all if omitted")
    parser.add_argument("--show", action="store_true", help="measure nothing, show what is there")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    tasks = tuple(task for task in TASKS if task in (given.task or TASKS))
    plan = Plan(given.base, given.output, tasks, given.rows, given.steps, given.batch_size, given.lr, given.quant)
    stages = given.stage or STAGES
    found = []
    for seed in range(given.seeds):
        at = replace(plan, seed=seed)
        if not given.show:
            measure(at, stages)
        found.append(Figures(at.folder / "figures.jsonl"))
    table = [row for arm in list_found(found) if (row := summarize(found, *arm))]
    if given.json:
        print_json(table)
        return
    columns = ["arm", "n", "tasks", "measure", "kept, mean", "95%", "worst", "each"]
    print_table("share of each task's own adapter, mean of seeds", columns, [[*map(str, row.values())] for row in table])


def measure(plan: Plan, stages: Sequence[str]) -> None:
    """Trains what is missing and measures the stages of one seed."""
    prepare_rows(plan)
    adapters = train_all(plan)
    figures = Figures(plan.folder / "figures.jsonl")
    tests = read_tests(plan)
    model = MixedModel.open(plan.base)
    for stage in stages:
        for arm in list_arms(plan, adapters, stage):
            missing = [task for task in arm.tasks if (arm.name, arm.tasks, task, EXACT) not in figures.found]
            if missing:
                print_note(f"seed {plan.seed}, {stage}: {arm.name} on {' '.join(arm.tasks)}")
                model.set_mix(arm.make())
            for task in missing:
                for kind, rows in score_rows(model, tests[task]).items():
                    figures.add((arm.name, arm.tasks, task, kind), rows)


def score_rows(model: MixedModel, rows: Sequence[Row]) -> dict[str, list[list[float]]]:
    """Scores each row's completion: the loss in nats and its tokens, and 1 of 1 if greedy decoding writes exactly it.

    Greedy decoding writes it if, and only if, each of its tokens with the end is the likeliest after those before it. So one
    forward pass gives both, and nothing is generated.
    """
    import torch

    loss, exact = ([[0.0, 0.0] for _ in rows] for _ in range(2))
    with torch.inference_mode():
        for batch in model.batches(rows):
            first = int((batch.targets != IGNORED).any(dim=0).nonzero()[0])
            targets, kept = batch.targets[:, first:], batch.ids.shape[1] - first + 1  # the one before predicts the first
            logits = model.model(input_ids=batch.ids, logits_to_keep=kept, use_cache=False).logits[:, :-1]
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
            right = ((logits.argmax(dim=-1) == targets) | (targets == IGNORED)).all(dim=1)
            tokens = (targets != IGNORED).sum(dim=1)
            for place, *found in zip(batch.rows, nats.sum(dim=1), tokens, right, strict=True):
                loss[place], exact[place] = [float(found[0]), float(found[1])], [float(found[2]), 1.0]
    return {LOSS: loss, EXACT: exact}


def list_found(seeds: Sequence[Figures]) -> list[tuple[str, tuple[str, ...], str]]:
    """Lists the arms that every seed has measured on all of their tasks, with the measure."""
    arms = dict.fromkeys((arm, tasks, kind) for arm, tasks, _, kind in seeds[0].found if arm not in (BASE, ALONE))
    return [
        (arm, tasks, kind)
        for arm, tasks, kind in arms
        if all((arm, tasks, task, kind) in each.found for each in seeds for task in tasks)
    ]


def summarize(seeds: Sequence[Figures], arm: str, tasks: tuple[str, ...], kind: str) -> dict[str, Any] | None:
    """Makes a table row: the share kept, mean over tasks and seeds with its interval, of the worst task, and of each.

    None before base and adapters were measured.
    """
    parts = []  # by seed and task: mix, base, alone, each float64 (rows, 2)
    for figures in seeds:
        for task in tasks:
            keys = (arm, tasks, task, kind), (BASE, (task,), task, kind), (ALONE, (task,), task, kind)
            if any(key not in figures.found for key in keys):
                return None
            parts.append([np.array(figures.found[key]) for key in keys])
    generator = np.random.default_rng(0)
    kept = [_share(part) for part in parts]
    drawn = np.zeros(RESAMPLES)
    for part in parts:
        picks = generator.integers(0, len(part[0]), (RESAMPLES, len(part[0])))
        drawn += np.array([_share([each[pick] for each in part]) for pick in picks]) / len(parts)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    by_task = {task: float(np.mean(kept[place :: len(tasks)])) for place, task in enumerate(tasks)}
    return {
        "arm": arm,
        "n": len(tasks),
        "tasks": " ".join(tasks),
        "measure": kind,
        "kept": f"{np.nanmean(kept):.3f}",
        "interval": f"{low:.3f} to {high:.3f}",
        "worst": f"{np.nanmin([*by_task.values()]):.3f}",
        "each": " ".join(f"{value:.3f}" for value in by_task.values()),
    }


def _share(parts: Sequence[Any]) -> float:
    """(mix - base) / (alone - base), not a number where the adapter gains nothing."""
    mix, base, alone = (float(part[:, 0].sum() / max(part[:, 1].sum(), 1)) for part in parts)
    return (mix - base) / (alone - base) if alone != base else float("nan")


if __name__ == "__main__":
    main()
