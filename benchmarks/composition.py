"""Composition on real tasks: what mixes keep of each adapter, by method, against control arms.

    make test                                                                    # sets up .venv
    .venv/bin/python -m benchmarks.composition --output composition-run          # hours on two cores: most of it trains adapters

Four domains of slot filling share one format and contradict each other. The tasks slots, sql and medical are far apart. Adapters
learn from the .train files, except for 100 rows each. Those rows choose the weight of each data-free method (one for all
adapters), and they are the only labels that learned mixes see. Scores are on the .test files: slot F1, or the loss if completions
are not slots. They are normalized: F1 relative to that of the task's own plain adapter, or the share of that adapter's loss
reduction that is kept (NAI). As the base's F1 is 0, both definitions agree there. Intervals are 95% bootstrap intervals over
rows. Results are kept in --output and not measured again. Needs the base `pocket` and the data (EDGELORA_MODELS, EDGELORA_DATA,
or ../shared/…).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.composition_arms import Arm, list_arms
from benchmarks.composition_data import DISTANT, Prepared, name_file, prepare
from benchmarks.pocket import SLOTS, find_base, find_data
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.data.scores import count_scores
from edgelora.in_torch.mixed_model import MixedModel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgelora.data.rows import Row

    Doubles = NDArray[np.float64]

MAX_TOKENS = 48
RESAMPLES = 1000
COMPOSABLE = ", composable"  # suffix of the sets whose adapters come from `train --composable`
SETS = {
    "four domains": SLOTS,
    f"four domains{COMPOSABLE}": SLOTS,
    "distant": DISTANT,
    "distant pair": DISTANT[:2],
    f"distant pair{COMPOSABLE}": DISTANT[:2],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--set", choices=sorted(SETS), action="append", help="repeatable; all if omitted")
    arguments = parser.parse_args()
    tables = {}
    for name in arguments.set or SETS:
        found = []
        for seed in range(arguments.seeds):
            composable = name.endswith(COMPOSABLE)
            prepared = prepare(
                find_base(), find_data(), arguments.output, seed, arguments.rows, SETS[name], composable=composable
            )
            found.append(measure(prepared, SETS[name], name))
        tables[name] = summarise(found, SETS[name])
    if arguments.json:
        print_json(tables)
        return
    for name, rows in tables.items():
        columns = ["arm", "mean normalised", "95%", "worst task", *SETS[name], "tried"]
        print_table(f"{name}: share of each task's own adapter, mean of seeds", columns, rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="folder for adapters, mixes and figures; reused")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=200, help="test rows per task")
    parser.add_argument("--json", action="store_true")


def measure(prepared: Prepared, tasks: Sequence[str], name: str) -> dict[str, tuple[int, dict[str, Doubles]]]:
    """By arm: configurations tried, and by task the counts of each test row."""
    model = MixedModel.open(prepared.base)
    found: dict[str, tuple[int, dict[str, Doubles]]] = {}
    store = prepared.scores(name)
    store.mkdir(parents=True, exist_ok=True)
    for arm in list_arms(prepared, tasks, model, store):
        path = store / f"{name_file(arm.name)}.json"
        if not path.exists():
            print_note(f"{prepared.folder.name}, {name}: {arm.name}")
            counts = {task: score_rows(model, arm, task, prepared.tests[task]).tolist() for task in tasks}
            path.write_text(json.dumps({"tried": arm.tried, "counts": counts}))
        value = json.loads(path.read_text())
        found[arm.name] = value["tried"], {task: np.array(rows) for task, rows in value["counts"].items()}
    return found


def score_rows(model: MixedModel, arm: Arm, task: str, rows: Sequence[Row]) -> Doubles:
    """Scores each row as a numerator and a denominator.

    They are F1's two counts if completions are slots, else nats and tokens.
    """
    model.set_mix(arm.mixes[task])
    if not task.startswith("slots"):
        return model.losses(rows)
    return np.array(count_scores(model.write(rows, MAX_TOKENS), [row.completion for row in rows]), np.float64)


def normalise(counts: Doubles, own: Doubles, base: Doubles) -> float:
    """(score - base) / (own - base), for slot F1 or the loss."""
    score, best, least = (float(each[:, 0].sum() / each[:, 1].sum()) for each in (counts, own, base))
    return (score - least) / (best - least)


def summarise(found: Sequence[Mapping[str, tuple[int, dict[str, Doubles]]]], tasks: Sequence[str]) -> list[list[str]]:
    """Makes a table row per arm.

    It has the mean over tasks and seeds with its interval, the worst task, each task, and configurations tried.
    """
    generator = np.random.default_rng(0)
    sizes = {task: len(found[0]["base"][1][task]) for task in tasks}
    picks = [{task: generator.integers(0, size, size) for task, size in sizes.items()} for _ in range(RESAMPLES)]
    whole = {task: np.arange(size) for task, size in sizes.items()}
    table = []
    for arm in found[0]:

        def kept(task: str, picked: Mapping[str, NDArray[np.int64]], arm: str = arm) -> float:
            rows = picked[task]
            each = [tuple(seed[name][1][task][rows] for name in (arm, "own adapter", "base")) for seed in found]
            return float(np.mean([normalise(*counts) for counts in each]))

        by_task = {task: kept(task, whole) for task in tasks}
        drawn = [np.mean([kept(task, picked) for task in tasks]) for picked in picks]
        low, high = np.quantile(drawn, [0.025, 0.975])
        figures = [f"{value:.3f}" for value in by_task.values()]
        mean, worst = np.mean(list(by_task.values())), min(by_task.values())
        table.append([arm, f"{mean:.3f}", f"{low:.3f} to {high:.3f}", f"{worst:.3f}", *figures, str(found[0][arm][0])])
    return table


if __name__ == "__main__":
    main()
