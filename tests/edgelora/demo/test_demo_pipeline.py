"""The demo from end to end, in a few steps on a tiny base: its outputs and its report."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from edgelora.cli.demo import show_demo
from edgelora.cli.terminal import print_json
from edgelora.data.rows import Row
from edgelora.demo import run_demo
from edgelora.demo.run import run_built_in_demo, split_rows
from edgelora.demo.settings import DemoSettings, MixSettings
from edgelora.demo.tasks import TaskSizes, make_tasks
from edgelora_runtime import Bundle, InputError, UsageError
from tests.edgelora.demo.test_demo_base import TINY

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = DemoSettings(
    base=replace(TINY, hidden=64, mlp=64),  # no narrower: bitsandbytes quantizes in blocks of 64
    sizes=TaskSizes(train=20, general=20, test=3),
    steps=2,
    batch_size=4,
    target_modules=("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"),
    max_tokens=4,
    mix=MixSettings(written=6, steps=2),
)
VARIANTS = {"base", "dates", "prices", "orders", "naive-sum", "mix", "mix-live"}


def test_it_makes_a_bundle_and_reports_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes: list[str] = []
    report = run_built_in_demo(tmp_path, 1, SETTINGS, on_note=notes.append)
    assert [f"· {stage} …" for stage in report.seconds] == notes
    assert capsys.readouterr().out == "", "the pipeline itself prints nothing"
    manifest = Bundle.open(report.bundle).manifest
    assert set(manifest.variants) == set(report.scores) == {switch.variant for switch in report.switches} == VARIANTS
    assert manifest.variants["mix-live"].kind == "live"
    assert manifest.adapters["mix"].rank == 3 * SETTINGS.rank
    assert set(report.kept) == set(report.test_rows) == {"dates", "prices", "orders"}
    show_demo(report)
    shown = capsys.readouterr().out
    assert all(name in shown for name in VARIANTS)
    assert "6 answers of each adapter" in shown
    print_json(report)
    assert json.loads(capsys.readouterr().out)["scores"].keys() == VARIANTS


@pytest.mark.slow
def test_it_runs_on_a_users_base_and_rows(tmp_path: Path) -> None:
    built_in = run_built_in_demo(tmp_path / "first", 1, SETTINGS)
    data = {}
    for task in make_tasks(SETTINGS.sizes, seed=2)[:2]:
        data[task.name] = str(tmp_path / f"{task.name}.jsonl")
        (tmp_path / f"{task.name}.jsonl").write_text(
            "".join(json.dumps(vars(row)) + "\n" for row in task.train), encoding="utf-8"
        )
    report = run_demo(tmp_path / "second", seed=1, base=str(built_in.bundle.parent / "base"), data=data)
    assert set(report.scores) == VARIANTS - {"orders"}


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    with pytest.raises(UsageError, match="two tasks"):
        run_demo(output, base="b", data={"one": "one.jsonl"})
    with pytest.raises(UsageError, match="go together"):
        run_demo(output, base="b")
    with pytest.raises(InputError, match="choose another name"):
        run_demo(output, base="b", data={"mix": "mix.jsonl", "other": "other.jsonl"})
    with pytest.raises(InputError, match="at least 10 rows"):
        split_rows("few", [Row(str(index), "x") for index in range(9)], 0)
    assert not output.exists()
