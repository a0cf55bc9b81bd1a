"""Compares searched weights with equal weights, on rows that no choice was made on.

    make test                                           # sets up .venv
    .venv/bin/python -m benchmarks.composition_search --output search-run      # an hour on two cores: most of it trains adapters

There are three distant tasks and three seeds. 100 rows of each task's training file are held out of training. `compose search`
uses half of them and reports on the other half. Then the best mix and the best equal weights are measured on rows of the .test
file. Intervals are 95% bootstrap intervals over rows. Needs the base `pocket` and the data (EDGELORA_MODELS, EDGELORA_DATA, or
../shared/…).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.pocket import find_base, find_data, hold_out, train_adapter, write_rows
from edgelora.adapters.folder import Adapter
from edgelora.cli.terminal import print_json, print_note, print_table, show_progress
from edgelora.data.rows import read_rows
from edgelora.in_torch.mixed_model import MixedModel
from edgelora.mix.mix import Mix
from edgelora.search.config import DISTINCT_METHODS, SearchConfig
from edgelora.search.objective import Objective, sum_up
from edgelora.search.run import search
from edgelora.search.space import Point

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from edgelora.data.rows import Row
    from edgelora.search.report import SearchReport

TASKS = ("slots-buses", "sql", "medical")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for adapters and searches; existing ones are reused")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=40)
    parser.add_argument("--method", default="linear", help="methods separated by commas, or all")
    parser.add_argument(
        "--held-out", type=int, default=100, help="training rows per task to hold out for the search and its report"
    )
    parser.add_argument("--rows", type=int, default=150, help="test rows per task")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    base, data = find_base(), find_data()
    methods = DISTINCT_METHODS if arguments.method == "all" else tuple(arguments.method.split(","))
    tests = {task: read_rows(data / f"{task}.test.jsonl")[: arguments.rows] for task in TASKS}
    held_out = split_rows(data, arguments.output / "data", arguments.held_out)
    found = []
    for seed in arguments.seeds:
        adapters = {
            task: train_adapter(base, held_out[task][0], arguments.output / f"seed-{seed}" / task, seed) for task in TASKS
        }
        config = SearchConfig(
            base=str(base),
            adapters=adapters,
            data={task: rows for task, (_, rows) in held_out.items()},
            output=arguments.output / f"seed-{seed}" / f"search-{arguments.method}",
            budget=arguments.budget,
            methods=methods,
            seed=seed,
        )
        with show_progress(f"searching, seed {seed}") as on_progress:
            report = search(config, on_progress=on_progress, on_note=print_note)
        found.append({"seed": seed, **measure(base, adapters, report, tests)})
    if arguments.json:
        print_json({"held_out": arguments.held_out, "rows": arguments.rows, "budget": arguments.budget, "seeds": found})
        return
    columns = ["seed", "tried", "best", "equal weights", "kept out: gain", "test: equal keeps", "best keeps", "gain"]
    print_table("share kept of the single adapters", columns, [[str(value) for value in row.values()] for row in found])


def split_rows(data: Path, folder: Path, held_out: int) -> dict[str, tuple[Path, Path]]:
    """Splits each task into a file of rows to train on, and a file of held-out rows.

    The latter has `held_out` distinct rows that are not in the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for task in TASKS:
        files[task] = folder / f"{task}.fit.jsonl", folder / f"{task}.held-out.jsonl"
        for path, part in zip(files[task], hold_out(read_rows(data / f"{task}.train.jsonl"), held_out), strict=True):
            write_rows(part, path)
    return files


def measure(base: Path, adapters: Mapping[str, Path], report: SearchReport, tests: Mapping[str, list[Row]]) -> dict[str, object]:
    """Measures what the best mix and equal weights keep on the test rows.

    Also returns the gain with its interval, here and in the report.
    """
    model = MixedModel.open(str(base))
    opened = {name: Adapter.open(folder, name) for name, folder in adapters.items()}

    def losses(point: Point) -> dict[str, NDArray[np.float64]]:
        model.set_mix(Mix(opened, point.weights, point.method, **point.settings))
        return {task: model.losses(rows) for task, rows in tests.items()}

    alone = {name: sum_up(losses(Point({name: 1.0}))) for name in adapters}
    objective = Objective.read(sum_up(losses(Point({}))), alone, higher_is_better=False)
    best, equal = losses(report.best.mix), losses(report.equal.mix)
    return {
        "tried": report.configurations,
        "best": describe(report.best.mix),
        "equal": describe(report.equal.mix),
        "kept_out_gain": interval(report.difference, *report.interval),
        "test_equal": f"{objective.kept(sum_up(equal)):.3f}",
        "test_best": f"{objective.kept(sum_up(best)):.3f}",
        "test_gain": interval(*objective.difference(best, equal, seed=0)),
    }


def describe(mix: Point) -> str:
    return f"{mix.method} " + " ".join(f"{weight:g}" for weight in [*mix.weights.values(), *mix.settings.values()])


def interval(value: float, low: float, high: float) -> str:
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    main()
