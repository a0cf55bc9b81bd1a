"""Tasks, splits and adapters of composition.py: trained once into its folder, and read from there after that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.pocket import SLOTS, STEPS, hold_out, train_adapter, write_rows
from edgelora.adapters.folder import Adapter
from edgelora.data.rows import read_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgelora.data.rows import Row

DISTANT = ("slots-buses", "sql", "medical")
LABELLED = 100  # rows of each task that no adapter learns from
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

    def fit(self, name: str) -> Path:
        """The rows that an adapter of that name learns from."""
        return _fit(self.folder.parent / "rows", name)

    def scores(self, tasks: str) -> Path:
        """The folder of what was measured on a set of tasks, by the set's name."""
        return self.folder / "scores" / name_file(tasks)

    def mix(self, adapters: Mapping[str, Adapter], name: str) -> Path:
        """The folder of a mix that is made on data of these adapters."""
        kind = "composable" if adapters == self.composable else "plain"
        return self.folder / "mixes" / f"{kind}-{'-'.join(adapters)}-{name.replace(' ', '')}"


def name_file(text: str) -> str:
    """A name in a table as one of a file."""
    return text.replace(": ", "-").replace(",", "").replace(" ", "-")


def prepare(
    base: Path, data: Path, output: Path, seed: int, count: int, tasks: Sequence[str], *, composable: bool = False
) -> Prepared:
    """Splits the rows and trains what is missing; count: test rows of each task. The controls go with the four domains."""
    splits = output / "rows"
    splits.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        _split(data / f"{task}.train.jsonl", _fit(splits, task), splits / f"{task}.labelled.jsonl")
    controls = tasks == SLOTS and not composable
    if controls:
        _join([_fit(splits, task) for task in SLOTS], _fit(splits, ALL))
        _join([splits / f"{task}.labelled.jsonl" for task in SLOTS], _fit(splits, FEW))

    def trained(name: str, folder: Path, slot: int | None, steps: int) -> Adapter:
        return Adapter.open(train_adapter(base, _fit(splits, name), folder, seed, steps=steps, composable=slot), folder.name)

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


def _fit(splits: Path, name: str) -> Path:
    return splits / f"{name}.fit.jsonl"


def _split(source: Path, fit: Path, labelled: Path) -> None:
    """Keeps LABELLED distinct rows out of what adapters learn from; equal rows go the same way."""
    if fit.exists() and labelled.exists():
        return
    for rows, path in zip(hold_out(read_rows(source), LABELLED), (fit, labelled), strict=True):
        write_rows(rows, path)


def _join(parts: Sequence[Path], whole: Path) -> None:
    if not whole.exists():
        write_rows([row for part in parts for row in read_rows(part)], whole)
