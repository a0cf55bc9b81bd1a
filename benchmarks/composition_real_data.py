"""The tasks, splits and adapters of composition_real.py: rows of eight tasks, and one short training each.

Rows are short, so that a training fits into minutes on two cores. Slot rows without a slot are one in four: three in four of the
source are, and teach and measure little.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.composition_arms import draw_random
from benchmarks.pocket import SLOTS, find_data, hold_out
from edgelora.adapters.folder import Adapter
from edgelora.cli.terminal import print_note
from edgelora.composing.compose import write_composed
from edgelora.data.rows import Row, read_rows
from edgelora.in_torch.train import train
from edgelora.in_torch.train_config import TrainConfig
from edgelora_export.base.base import Base
from edgelora_export.base.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

STYLE = "style"
TASKS = (*SLOTS, "sql", "medical", "math", STYLE)
ALL = "all"  # one adapter trained on the rows of all tasks, a control
LABELLED = 100  # rows per task that no adapter is trained on
LONGEST = 240  # characters of a row
NONE = "none"  # the completion of a slot row without slots
_SLOT_SHARE = 3  # rows with slots to one without


@dataclass(frozen=True)
class Plan:
    """What is trained and measured.

    base: folder, GGUF file or hub id. output: folder of rows, adapters and figures. tasks: some of TASKS. rows: test rows per
    task. steps, batch, lr and quant are those of each training, in TrainConfig's words.
    """

    base: str
    output: Path
    tasks: tuple[str, ...]
    rows: int
    steps: int
    batch: int
    lr: float
    quant: str
    seed: int = 0

    @property
    def folder(self) -> Path:
        """The folder of this seed."""
        return self.output / f"seed-{self.seed}"


def prepare_rows(plan: Plan) -> None:
    """Writes the rows of the tasks to train on, to choose and learn on, and to test on.

    They are conversations, or text for a base without a chat template.
    """
    folder = plan.output / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / f"{task}.test.jsonl").exists() for task in plan.tasks):
        return
    chats = load_tokenizer(Base.find(plan.base)).chat_template is not None
    for task in plan.tasks:
        if (folder / f"{task}.test.jsonl").exists():
            continue
        known, unseen = (_read_task(task, split) for split in ("train", "test"))
        fit, labelled = hold_out(known, LABELLED)
        rest = set(known)
        test = [row for row in hold_out(unseen, len(unseen))[1] if row not in rest]
        for name, rows in (("fit", fit), ("labelled", labelled), ("test", test)):
            _write_rows(rows, folder / f"{task}.{name}.jsonl", chats=chats)


def rows_file(plan: Plan, task: str, split: str) -> Path:
    """The file of a task's rows. split: fit, labelled or test."""
    return plan.output / "rows" / f"{task}.{split}.jsonl"


def read_tests(plan: Plan) -> dict[str, list[Row]]:
    """Reads the first test rows of every task."""
    return {task: read_rows(rows_file(plan, task, "test"))[: plan.rows] for task in plan.tasks}


def train_all(plan: Plan) -> dict[str, Adapter]:
    """Trains the adapters that are missing, one after the other."""
    return {task: Adapter.open(train_one(plan, task), task) for task in plan.tasks}


def train_one(plan: Plan, task: str) -> Path:
    """Trains the adapter of a task on its first rows, or with ALL one on an equal share of each, unless its folder is there."""
    folder = plan.folder / task
    if folder.exists():
        return folder
    print_note(f"training {folder}")
    count = plan.steps * plan.batch
    data = rows_file(plan, task, f"seed-{plan.seed}")
    if task == ALL:
        count *= len(plan.tasks)
        each = [rows_file(plan, one, "fit").read_text().splitlines()[: count // len(plan.tasks)] for one in plan.tasks]
        lines = [line for several in zip(*each, strict=False) for line in several]
    else:
        lines = rows_file(plan, task, "fit").read_text().splitlines()
        np.random.default_rng(plan.seed).shuffle(lines)
        lines = lines[:count]
    data.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    config = TrainConfig(plan.base, data, folder, quant=plan.quant, lr=plan.lr, batch_size=plan.batch, seed=plan.seed)
    config = replace(config, max_steps=count // plan.batch)
    report = train(config, on_progress=lambda done, total, what: print_note(f"{task} {done}/{total} {what}"))
    print_note(f"{task}: {report.steps} steps in {report.seconds:.0f} s, loss {report.train_loss:.3f}")
    return folder


def random_adapters(plan: Plan, adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Draws an adapter of random directions for each one, with the same norm in every module, unless it is there."""
    found = {}
    for place, (task, adapter) in enumerate(adapters.items()):
        folder = plan.folder / "random" / task
        if not folder.exists():
            write_composed(folder, draw_random(adapter, place), adapter, adapter.provenance)
        found[task] = Adapter.open(folder, f"random-{task}")
    return found


def _read_task(task: str, split: str) -> list[Row]:
    """Reads the short rows of a task: prompt and completion as text."""
    rows = _read_speeches(split) if task == STYLE else read_rows(find_data() / f"{task}.{split}.jsonl")
    rows = [row for row in rows if len(str(row.prompt)) + len(str(row.completion)) <= LONGEST]
    if task not in SLOTS:
        return rows
    empty = [row for row in rows if str(row.completion).strip() == NONE]
    full = [row for row in rows if str(row.completion).strip() != NONE]
    return full + empty[: len(full) // _SLOT_SHARE]


def _read_speeches(split: str) -> list[Row]:
    """Reads replies from the plays: the first nine tenths of the text to train on, the rest to test on."""
    text = (find_data() / "shakespeare.txt").read_text(encoding="utf-8")
    cut = text.index("\n\n", len(text) * 9 // 10)
    speeches = [part.strip().partition(":\n") for part in (text[:cut] if split == "train" else text[cut:]).split("\n\n")]
    return [
        Row(f"{speaker} says: {speech}\nReply as {other}, in the manner of the play.", reply)
        for (speaker, _, speech), (other, _, reply) in itertools.pairwise(speeches)
        if speech and len(reply) >= 40  # shorter ones hold no style
    ]


def _write_rows(rows: Sequence[Row], path: Path, *, chats: bool) -> None:
    lines = []
    for row in rows:
        prompt, completion = str(row.prompt).strip(), str(row.completion).strip()
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        value = {"messages": turns} if chats else {"prompt": f"{prompt}\n", "completion": completion}
        lines.append(json.dumps(value, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
