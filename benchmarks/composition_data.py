"""The tasks, splits and adapters of composition.py.

Adapters are trained once and kept in its folder.
"""

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
LABELLED = 100  # rows per task that no adapter is trained on
ALL, FEW = "slots-all", "slots-few"  # one adapter trained on all domains' rows, and one only on their labelled rows


@dataclass(frozen=True)
class Prepared:
    """The adapters and rows of one seed, by task.

    Composable adapters and the two controls are optional. labelled: files of the rows that no adapter was trained on. tests: rows
    that are used for nothing else.
    """

    base: str
    folder: Path
    plain: Mapping[str, Adapter]
    composable: Mapping[str, Adapter]
    controls: Mapping[str, Adapter]
    labelled: Mapping[str, Path]
    tests: Mapping[str, Sequence[Row]]

    def fit(self, name: str) -> Path:
        """The file of rows that the adapter of this name is trained on."""
        return _fit(self.folder.parent / "rows", name)

    def scores(self, tasks: str) -> Path:
        """The folder for results on the set of tasks with this name."""
        return self.folder / "scores" / name_file(tasks)

    def mix(self, adapters: Mapping[str, Adapter], name: str) -> Path:
        """The folder of a mix that is learned on these adapters' data."""
        kind = "composable" if adapters == self.composable else "plain"
        return self.folder / "mixes" / f"{kind}-{'-'.join(adapters)}-{name.replace(' ', '')}"


def name_file(text: str) -> str:
    """Turns a name in a table into a file name."""
    return text.replace(": ", "-").replace(",", "").replace(" ", "-")


def prepare(
    base: Path, data: Path, output: Path, seed: int, count: int, tasks: Sequence[str], *, composable: bool = False
) -> Prepared:
    """Splits the rows and trains missing adapters.

    count: test rows per task. Only the four domains have controls.
    """
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
    """Sets LABELLED distinct rows aside from training, along with rows equal to them."""
    if fit.exists() and labelled.exists():
        return
    for rows, path in zip(hold_out(read_rows(source), LABELLED), (fit, labelled), strict=True):
        write_rows(rows, path)


def _join(parts: Sequence[Path], whole: Path) -> None:
    if not whole.exists():
        write_rows([row for part in parts for row in read_rows(part)], whole)
