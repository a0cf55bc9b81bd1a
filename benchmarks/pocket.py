"""The real base and tasks that benchmarks share.

It finds their folders, holds rows out, and trains adapters once.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.cli.terminal import print_note
from edgelora.in_torch.train import train
from edgelora.in_torch.train_config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edgelora.data.rows import Row

SLOTS = ("slots-buses", "slots-events", "slots-homes", "slots-rentalcars")
STEPS, LEARNING_RATE = 250, 2e-3


def find_base() -> Path:
    """The folder of `pocket`: in EDGELORA_MODELS, or in ../shared/models."""
    return Path(os.environ.get("EDGELORA_MODELS", "../shared/models")) / "pocket"


def find_data() -> Path:
    """The folder of the tasks' rows: EDGELORA_DATA, or ../shared/data."""
    return Path(os.environ.get("EDGELORA_DATA", "../shared/data"))


def hold_out(rows: Sequence[Row], count: int) -> tuple[list[Row], list[Row]]:
    """Splits rows into training rows and `count` distinct held-out rows.

    No held-out row is among the training rows.
    """
    distinct = list(dict.fromkeys(rows))
    random.Random(0).shuffle(distinct)
    apart = set(distinct[:count])
    return [row for row in rows if row not in apart], distinct[:count]


def write_rows(rows: Iterable[Row], path: Path) -> None:
    path.write_text("".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def train_adapter(base: Path, rows: Path, folder: Path, seed: int, *, steps: int = STEPS, composable: int | None = None) -> Path:
    """Trains an adapter if its folder is missing. Returns the folder."""
    if not folder.exists():
        print_note(f"training {folder.name}, seed {seed}")
        train(TrainConfig(str(base), rows, folder, lr=LEARNING_RATE, max_steps=steps, seed=seed, composable=composable))
    return folder
