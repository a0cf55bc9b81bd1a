"""The demo on a real model: with a tiny base in its place, what it reports and resumes; and the command itself, in minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

from edgelora.cli.demo import show_real_demo
from edgelora.demo.real import INSTALL, PACKAGE, RealSettings, run_real_demo
from edgelora.in_torch.train import TrainingStoppedError
from edgelora_runtime import Bundle, InputError
from tests.tiny import make_base

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SETTINGS = RealSettings(steps=2, batch_size=2, rank=2, lr=5e-2, test_rows=2, shown=1, max_tokens=4, context_length=256)
VARIANTS = ["base", "orders", "sql", "pirate", "mix"]


@contextmanager
def stop_at_once() -> Iterator[Callable[[], bool]]:
    yield lambda: True


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_base(tmp_path / "base", max_position_embeddings=512)
    output = tmp_path / "demo"
    with pytest.raises(TrainingStoppedError, match="step 1 is saved"):
        run_real_demo(output, 1, base=tmp_path / "base", settings=SETTINGS, watch_for_stop=stop_at_once)

    steps: list[int] = []
    report = run_real_demo(
        output,
        1,
        base=tmp_path / "base",
        settings=SETTINGS,
        on_progress=lambda done, total, what: steps.append(done) if what.startswith("loss") else None,
    )
    assert steps == [2, 1, 2, 1, 2], "the first adapter goes on from its checkpoint"
    manifest = Bundle.open(report.bundle).manifest
    assert {name: variant.kind for name, variant in manifest.variants.items()} == report.kinds
    assert manifest.default_variant == "mix"
    assert manifest.variants["mix"].method == "core_tsv"
    assert [*report.right] == VARIANTS == [switch.variant for switch in report.switches]
    assert [len(answers) for answers in report.answers.values()] == [len(VARIANTS)] * 3
    assert report.test_rows == {"orders": 2, "sql": 2, "pirate": 2}
    assert capsys.readouterr().out == "", "the pipeline itself prints nothing"

    show_real_demo(report)
    shown = capsys.readouterr().out
    assert all(question in shown for question in report.answers)
    assert all(name in shown for name in VARIANTS)

    notes: list[str] = []
    again = run_real_demo(output, 1, base=tmp_path / "base", settings=SETTINGS, on_note=notes.append)
    assert [*again.seconds] == ["ask every variant"], "nothing that is done is done again"
    assert again.answers == report.answers
    assert sum("is trained" in note for note in notes) == 3

    with pytest.raises(InputError, match="another seed"):
        run_real_demo(output, 2, base=tmp_path / "base", settings=SETTINGS)


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no folder of this demo"):
        run_real_demo(tmp_path, 1, base=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_absent_model_is_named_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelora.demo.real.PACKAGE", "no_such_package_of_models")
    with pytest.raises(InputError, match=INSTALL):
        run_real_demo(tmp_path / "demo", 1)
    assert not (tmp_path / "demo").exists()


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgelora", "demo", *arguments], capture_output=True, text=True, check=False)


def test_own_data_and_the_real_model_exclude_each_other(tmp_path: Path) -> None:
    done = run_demo("--real", "--base", "base", "--output", str(tmp_path / "demo"))
    assert done.returncode == 2
    assert done.stderr.strip().endswith("leave out --base and --data, or --real")
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_command_runs_on_the_real_model_and_ends_in_a_chat(tmp_path: Path) -> None:
    if find_spec(PACKAGE) is None:
        pytest.skip(f"SmolLM2 is absent: {INSTALL}")
    output = tmp_path / "demo"
    done = run_demo("--real", "--output", str(output), "--json")
    assert done.returncode == 0, done.stderr
    right = json.loads(done.stdout)["right"]
    assert set(right["base"].values()) == {0}
    assert [*right] == VARIANTS
    shown = run_demo("--real", "--output", str(output))
    assert "is trained" in shown.stderr
    assert shown.stderr.strip().splitlines()[-1] == f"next: ask it yourself: edgelora chat {output / 'bundle'} --variant mix"
    assert "mix in " in run_in_terminal("--real", "--output", str(output)), "the receipt of the chat's variant"


def run_in_terminal(*arguments: str) -> str:
    """Runs the demo at a terminal of its own, and leaves the chat at its end. Returns all that the terminal shows."""
    import pty  # absent on Windows

    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "edgelora", "demo", *arguments], stdin=theirs, stdout=theirs, stderr=theirs
    ) as run:
        os.close(theirs)
        os.write(ours, b"/quit\n")
        shown = b""
        try:
            while piece := os.read(ours, 1 << 16):
                shown += piece
        except OSError:  # Linux says so that the other end is closed
            pass
        os.close(ours)
    assert run.returncode == 0, shown
    return shown.decode()
