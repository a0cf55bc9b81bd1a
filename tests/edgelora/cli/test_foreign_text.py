"""Text of strangers in what verbs print: names of files, variants, tensors and templates, and the model's answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgelora.cli.terminal import print_line, print_note, print_piece, print_table
from edgelora.formatting import to_json

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "runtime" / "bundle" / "golden" / "bundle"
EVIL = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202egnp\r\nedgelora: all is well"


def check_start(folder: Path, *arguments: object, code: int) -> str:
    """Runs a verb that fails, with and without --json. Its message is one line without anything that a terminal obeys."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    command = [sys.executable, "-m", "edgelora", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="surrogateescape")
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert done.stdout.removesuffix("\n").isprintable()
    assert json.loads(done.stdout)["error"] == lines[0].removeprefix("edgelora: ")
    assert not any(line.startswith("edgelora: all is well") for line in lines)
    return lines[0]


def test_names_of_tensors(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    save_file({f"base_model.{EVIL}.weight": np.zeros((2, 2), np.float32)}, tmp_path / "a" / "adapter_model.safetensors")
    assert "owned" in check_start(tmp_path, "inspect", "a", code=3)


def test_names_in_a_config(tmp_path: Path, tiny_adapters: Mapping[str, Path]) -> None:
    shutil.copytree(tiny_adapters["plain"], tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": EVIL}))
    assert "owned" in check_start(tmp_path, "compose", "--adapter", "a", "--output", "m", code=3)


def test_names_in_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f"base = 'x'\n{json.dumps(EVIL)} = 1\n[variants.{json.dumps(EVIL)}]\n", encoding="utf-8")
    assert "owned" in check_start(tmp_path, "export", "r.toml", "--output", "b", code=3)


@pytest.mark.parametrize("place", ["variants", "default_variant"])
def test_names_in_a_manifest(place: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "bundle.json").read_text(encoding="utf-8"))
    manifest[place] = {EVIL: manifest["variants"]["base"]} if place == "variants" else EVIL
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    check_start(tmp_path, "inspect", "b", code=4)


def test_names_of_files(tmp_path: Path) -> None:
    folder = tmp_path / EVIL.replace("/", "").replace("\n", " ")
    shutil.copytree(GOLDEN, folder)
    (folder / "tokenizer.json").unlink()
    assert "owned" in check_start(tmp_path, "verify", folder.name, code=4)


def test_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    check_start(tmp_path, "inspect", os.fsdecode(b"caf\xe9"), code=3)


def test_tables_and_lines_print_names_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    """rich takes [red] for a color and [link=…] for a link, where it is let."""
    print_table(f"t {EVIL}", ["variant", f"[red]{EVIL}"], [[f"[link=http://x]{EVIL}", EVIL], ["plain", "1"]])
    print_line(EVIL)
    print_note(EVIL)
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in (*out.splitlines(), *err.splitlines()))
    assert "[red]" in out
    assert "[link=http://x]" in out
    assert not any(line.lstrip().startswith("edgelora: all is well") for line in (*out.splitlines(), *err.splitlines()))


def test_json_holds_the_text_and_shows_none_of_it() -> None:
    shown = to_json({"name": EVIL, "é": "日本語 🙂"})
    assert shown.isprintable()
    assert "日本語 🙂" in shown
    assert json.loads(shown) == {"name": EVIL, "é": "日本語 🙂"}


def test_an_answer_is_clean_on_a_terminal_and_whole_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = f"a\tb\nc {EVIL} 👩\u200d💻\u3000日本"
    print_piece(answer)
    assert capsys.readouterr().out == answer
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_piece(answer)
    assert capsys.readouterr().out == "a\tb\nc ]0;owned[31m2Jgnp\nedgelora: all is well 👩\u200d💻\u3000日本"
