"""Tasks, splits and adapters of composition.py: trained once into its folder, and read from there after that."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora.adapters import Adapter
from edgelora.rows import Row, read_rows
from edgelora.terminal import print_note
from edgelora.training import TrainConfig, train

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

DOMAINS = ("slots-buses", "slots-events", "slots-homes", "slots-rentalcars")
DISTANT = ("slots-buses", "sql", "medical")
LABELLED = 100  # rows of each task that no adapter learns from
STEPS, LEARNING_RATE = 250, 2e-3
ALL, FEW = "slots-all", "slots-few"  # one adapter on all domains' rows, and one on their labelled rows alone


@dataclass(frozen=True)
class Prepared:
    """What is measured with one seed: adapters by task, plain and perhaps composable, perhaps the two controls; rows by task.

    labelled: files of the rows that no adapter learned from. tests: rows that nothing else sees.
    """

    base: str
    folder: Path
    plain: Mapping[str, Adapter]
    composable: Mapping[str, Adapter]
    controls: Mapping[str, Adapter]
    labelled: Mapping[str, Path]
    tests: Mapping[str, Sequence[Row]]


def prepare(
    base: Path, data: Path, output: Path, seed: int, count: int, tasks: Sequence[str], *, composable: bool = False
) -> Prepared:
    """Splits the rows and trains what is missing; count: test rows of each task. The controls go with the four domains."""
    splits = output / "rows"
    splits.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        _split(data / f"{task}.train.jsonl", splits / f"{task}.fit.jsonl", splits / f"{task}.labelled.jsonl")
    controls = tasks == DOMAINS and not composable
    if controls:
        _join([splits / f"{task}.fit.jsonl" for task in DOMAINS], splits / f"{ALL}.fit.jsonl")
        _join([splits / f"{task}.labelled.jsonl" for task in DOMAINS], splits / f"{FEW}.fit.jsonl")

    def trained(name: str, folder: Path, slot: int | None, steps: int) -> Adapter:
        if not folder.exists():
            print_note(f"training {folder}")
            rows = splits / f"{name}.fit.jsonl"
            train(TrainConfig(str(base), rows, folder, lr=LEARNING_RATE, max_steps=steps, seed=seed, composable=slot))
        return Adapter.open(folder, folder.name)

    folder = output / f"seed-{seed}"
    return Prepared(
        str(base),
        folder,
        {task: trained(task, folder / task, None, STEPS) for task in tasks},
        {task: trained(task, folder / "composable" / task, slot, STEPS) for slot, task in enumerate(tasks if composable else ())},
        {name: trained(name, folder / name, None, steps) for name, steps in ((ALL, 2 * STEPS), (FEW, STEPS)) if controls},
        {task: splits / f"{task}.labelled.jsonl" for task in tasks},
        {task: read_rows(data / f"{task}.test.jsonl")[:count] for task in tasks},
    )


def _split(source: Path, fit: Path, labelled: Path) -> None:
    """Keeps LABELLED distinct rows out of what adapters learn from; equal rows go the same way."""
    if fit.exists() and labelled.exists():
        return
    rows = read_rows(source)
    distinct = list(dict.fromkeys(rows))
    random.Random(0).shuffle(distinct)
    kept = distinct[:LABELLED]
    _write([row for row in rows if row not in set(kept)], fit)
    _write(kept, labelled)


def _join(parts: Sequence[Path], whole: Path) -> None:
    if not whole.exists():
        _write([row for part in parts for row in read_rows(part)], whole)


def _write(rows: Sequence[Row], path: Path) -> None:
    path.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows), encoding="utf-8")
