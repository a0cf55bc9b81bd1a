"""`edgelora train --inspect` as its user starts it: rows with the text that carries loss, their lengths, and nothing trained."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgelora.data.encode_rows import RowEncoder
from edgelora.data.inspect_rows import inspect_rows
from edgelora.data.rows import Row
from tests.tiny import make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[3]
TURNS = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]


def edgelora(folder: Path, arguments: Sequence[object], *, terminal: bool = False) -> tuple[int, str, str]:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    environment = {**os.environ, "PYTHONPATH": path, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-m", "edgelora", "train", "--inspect", *map(str, arguments)]
    if not terminal:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout, done.stderr
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(command, cwd=folder, stdout=follower, stderr=subprocess.DEVNULL, env=environment)
    os.close(follower)
    printed = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        printed += piece
    os.close(leader)
    return process.wait(), printed.decode(), ""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    lines = [{"messages": TURNS}, {"prompt": "a day", "completion": " in the sun"}, {"prompt": "the " * 90, "completion": " cat"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "train.toml").write_text("max_length = 64\n")
    return tmp_path / "rows.jsonl"


def test_in_a_pipe_marks_stand_around_text_with_loss(rows: Path, tiny_base: Path) -> None:
    code, out, err = edgelora(rows.parent, ["--base", tiny_base, "--data", "rows.jsonl", "--config", "train.toml"])
    assert code == 0, err
    assert "rows.jsonl line 1: " in out and "(prefixes)" in out
    assert "<s>user: the cat\nassistant:⟦ sat\n</s>⟧" in out
    assert "a day⟦ in the sun</s>⟧" in out
    assert "rows 3; cut to 64 tokens 0; left out, with nothing to learn within them, 1; tokens of the rest " in out
    assert "loss is told by: completion 2, prefixes 1" in out
    assert re.search(r"^ 7–15 tokens  1  █{40}$", out, re.MULTILINE), out
    assert err.strip() == "nothing was trained; leave out --inspect to train"
    assert sorted(path.name for path in rows.parent.iterdir() if path.suffix) == ["rows.jsonl", "train.toml"], (
        "nothing is written"
    )


def test_as_json(rows: Path, tiny_base: Path) -> None:
    code, out, err = edgelora(rows.parent, ["--base", tiny_base, "--data", "rows.jsonl", "--json"])
    assert code == 0, err
    found = json.loads(out)
    assert (found["rows"], found["rows_cut"], found["rows_left_out"], found["loss_on"]) == (
        3,
        0,
        0,
        {"prefixes": 1, "completion": 2},
    )
    assert sum(part["rows"] for part in found["lengths"]["histogram"]) == 3
    assert found["samples"][1]["pieces"] == [
        {"text": "a day", "learned": False}, {"text": " in the sun</s>", "learned": True},
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_in_a_terminal_text_with_loss_has_a_colour(rows: Path, tiny_base: Path) -> None:
    code, out, _ = edgelora(rows.parent, ["--base", tiny_base, "--data", "rows.jsonl"], terminal=True)
    assert code == 0
    assert "\x1b[1;32m in the sun</s>\x1b[0m" in out and "⟦" not in out


def test_training_needs_an_output(rows: Path) -> None:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    command = [sys.executable, "-m", "edgelora", "train", "--base", "x", "--data", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 2
    assert "--output is missing; give a folder for the adapter, or --inspect" in done.stderr


def test_counts_are_those_of_the_encoded_rows() -> None:
    """Lengths, cut rows and samples of many rows, against their own encodings."""
    encoder = RowEncoder(make_tokenizer())
    rows = [Row("the cat", " sat" * number, place=f"rows line {number}") for number in range(1, 41)]
    seen = inspect_rows(encoder, rows, 20)
    encoded = [encoder.learn(row) for row in rows]
    assert seen.lengths == tuple(sorted(len(row.tokens) for row in encoded))
    assert seen.rows_cut == sum(len(row.tokens) > 20 for row in encoded) > 0
    assert seen.rows_left_out == 0
    assert seen.tokens == sum(min(20, len(row.tokens)) for row in encoded)
    assert [sample.place for sample in seen.samples] == [f"rows line {number}" for number in (1, 10, 20, 30, 40)]
    bins = seen.histogram()
    assert sum(count for _, _, count in bins) == 40 and len(bins) <= 10
    for first, last, count in bins:
        assert count == sum(first <= length <= last for length in seen.lengths)
    assert "".join(text for text, _ in seen.samples[0].pieces) == "the cat sat</s>"
