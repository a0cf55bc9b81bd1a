"""Fixtures: what `edgelora demo` leaves behind, made in seconds with random adapters; and the real thing, for slow tests."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def quick_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the names and shapes of the demo's; its adapters are random."""
    from edgelora.demo.base import make_base
    from edgelora.demo.run import MIX, _list_variants, _write_recipe, _write_rows
    from edgelora.demo.tasks import TaskSizes, make_tasks
    from edgelora.exporting.export import export
    from tests.edgelora.demo.test_demo_base import TINY
    from tests.tiny import make_adapter

    folder = tmp_path_factory.mktemp("quick") / "edgelora-demo"
    base = folder / "base"
    make_base(base, replace(TINY, hidden=64, mlp=64))  # no narrower: bitsandbytes quantizes in blocks of 64
    names = []
    for seed, task in enumerate(make_tasks(TaskSizes(train=20, general=20, test=1))):
        _write_rows(folder / "data" / f"{task.name}.train.jsonl", task.train)
        make_adapter(base, folder / "adapters" / task.name, seed=seed)
        names.append(task.name)
    make_adapter(base, folder / "adapters" / MIX, seed=len(names))
    adapters = {name: folder / "adapters" / name for name in (*names, MIX)}
    _write_recipe(folder / "recipe.toml", str(base), adapters, _list_variants(names))
    export(folder / "recipe.toml", folder / "bundle")
    return folder


@pytest.fixture(scope="session")
def real_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder, as a reader gets it: minutes."""
    from edgelora.demo.run import run_built_in

    folder = tmp_path_factory.mktemp("real") / "edgelora-demo"
    run_built_in(folder, 1)
    return folder
