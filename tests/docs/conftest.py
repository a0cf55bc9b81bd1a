"""Fixtures: what `edgelora demo` leaves behind, made in seconds with random adapters; and the real thing, for slow tests."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = """\
base = "base"
[adapters]
dates = "adapters/dates"
prices = "adapters/prices"
orders = "adapters/orders"
mix = "adapters/mix"
[variants]
base = { mix = {} }
dates = { mix = { dates = 1.0 } }
prices = { mix = { prices = 1.0 } }
orders = { mix = { orders = 1.0 } }
naive-sum = { mix = { dates = 1.0, prices = 1.0, orders = 1.0 } }
mix = { mix = { mix = 1.0 } }
mix-live = { mix = { mix = 1.0 }, kind = "live" }
"""


@pytest.fixture(scope="session")
def quick_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the names and shapes of the demo's; its adapters are random."""
    from edgelora.demo.base import make_base
    from edgelora.demo.tasks import TaskSizes, make_tasks
    from edgelora.exporting.export import export
    from tests.edgelora.demo.test_demo_base import TINY
    from tests.tiny import make_adapter

    folder = tmp_path_factory.mktemp("quick") / "edgelora-demo"
    make_base(folder / "base", replace(TINY, hidden=64, mlp=64))  # no narrower: bitsandbytes quantizes in blocks of 64
    (folder / "data").mkdir()
    for task in make_tasks(TaskSizes(train=20, general=20, test=1)):
        lines = [json.dumps(vars(row)) + "\n" for row in task.train]
        (folder / "data" / f"{task.name}.train.jsonl").write_text("".join(lines), encoding="utf-8")
    for seed, name in enumerate(("dates", "prices", "orders", "mix")):
        make_adapter(folder / "base", folder / "adapters" / name, seed=seed)
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    export(folder / "recipe.toml", folder / "bundle")
    return folder


@pytest.fixture(scope="session")
def real_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder, as a reader gets it: minutes."""
    from edgelora.demo import run_demo

    folder = tmp_path_factory.mktemp("real") / "edgelora-demo"
    run_demo(folder)
    return folder
