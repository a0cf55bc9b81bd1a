"""Rows of messages as a user gives them: every verb that takes rows, run as a command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edgelora.adapters.folder import read_provenance

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[3]


def edgelora(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    command = [sys.executable, "-m", "edgelora", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def answer(folder: Path, *arguments: object) -> Any:
    done = edgelora(folder, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_rows(word: str) -> list[object]:
    return [
        {"messages": [{"role": "user", "content": f"the {word} number {n}"}, {"role": "assistant", "content": f"sat {n}"}]}
        for n in range(24)
    ]


@pytest.fixture
def workplace(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(tiny_base, tmp_path / "base")
    for name, kind in (("a", "plain"), ("b", "other")):
        shutil.copytree(tiny_adapters[kind], tmp_path / name)
        write_rows(tmp_path / f"{name}.jsonl", make_rows(name))
    (tmp_path / "recipe.toml").write_text('base = "base"\n[adapters]\nt = "t"\n[variants.t]\nmix = { t = 1.0 }\n')
    return tmp_path


@pytest.mark.slow
def test_train_export_and_eval(workplace: Path) -> None:
    options = ["--template-option", "enable_thinking=false", "--template-option", 'tone="dry"']
    report = answer(
        workplace, "train", "--base", "base", "--data", "a.jsonl", "--output", "t", "--max-steps", 2, "--quant", "none", *options
    )
    assert (report["rows"], report["rows_cut"], report["rows_left_out"]) == (24, 0, 0)
    provenance = read_provenance(workplace / "t")
    assert provenance is not None
    assert provenance.template_options == {"enable_thinking": False, "tone": "dry"}
    assert report["loss_on"] == provenance.loss_on == {"prefixes": 24}
    exported = answer(workplace, "export", "recipe.toml", "--output", "bundle")
    assert exported
    scores = answer(workplace, "eval", "bundle", "--data", "b.jsonl", "--limit", 3)
    assert scores["rows"] == 3 and scores["loss"] > 0


@pytest.mark.slow
def test_learn(workplace: Path) -> None:
    two = ["--adapter", "a=a", "--adapter", "b=b"]
    data = ["--data", "a=a.jsonl", "--data", "b=b.jsonl"]
    prompts = ["--prompts", "a=a.jsonl", "--prompts", "b=b.jsonl"]
    learned = answer(workplace, "compose", "learn", "--base", "base", *two, *data, *prompts, "--output", "l", "--steps", 2)
    assert learned["rows"] == {"a": 24, "b": 24}


@pytest.mark.parametrize(
    ("row", "options", "line"),
    [
        ({"prompt": "a", "completion": "\ud800"}, [], r"rows.jsonl line 1: completion holds \ud800, half of a surrogate pair"),
        (
            {"prompt": "a", "completion": "b"},
            ["--config", "q.toml"],
            "target_modules: no layer of the base is named 'q_prj'; near",
        ),
        ({"prompt": "a " * 5000, "completion": "b"}, [], "data file rows.jsonl: no row has a token to learn"),
        ({"messages": [{"role": "user", "content": "a"}]}, [], "rows.jsonl line 1 ends with a message of 'user'"),
    ],
    ids=["surrogate", "target", "long", "no answer"],
)
def test_what_cannot_be_trained_is_one_line(workplace: Path, row: object, options: list[str], line: str) -> None:
    write_rows(workplace / "rows.jsonl", [row])
    (workplace / "q.toml").write_text('target_modules = ["q_prj"]\n')
    done = edgelora(workplace, "train", "--base", "base", "--data", "rows.jsonl", "--output", "t", *options)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"edgelora: {line}")
    assert done.stderr.count("\n") == 1
    assert not (workplace / "t").exists()


def test_a_template_option_that_is_no_json_is_a_wrong_call(workplace: Path) -> None:
    done = edgelora(workplace, "train", "--base", "b", "--data", "a.jsonl", "--output", "t", "--template-option", "tone=dry")
    assert done.returncode == 2
    assert done.stderr == "edgelora: --template-option tone=dry is no JSON; put a text in quotes: tone='\"dry\"'\n"
