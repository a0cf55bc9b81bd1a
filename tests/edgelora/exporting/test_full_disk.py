"""A full disk, at many points of an export and of training, and a limit on files: exit code 5, a name, and work that is kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.forked_commands import Commands

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")]
POINTS = int(os.environ.get("EDGELORA_FULL_DISKS", "6"))  # set EDGELORA_FULL_DISKS=30 for the claim of the docs
SIZE = 16 << 20  # bytes of the disk
RECIPE = """\
base = {base}
[adapters]
a = {a}
[quantization]
method = "gptq"
[variants.base]
mix = {{}}
[variants.a]
mix = {{ a = 1.0 }}
[variants.alone]
mix = {{ a = 0.5 }}
kind = "live"
"""
TRAIN = ["--max-steps", "6", "--batch-size", "2", "--rank", "64", "--lr", "1e-3", "--quant", "none", "--checkpoint-every", "1"]


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of SIZE bytes. Skips the test where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def leaving_free(disk: Path, free: int) -> Iterator[None]:
    """Fills a disk but for so many bytes."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - free))
    try:
        yield
    finally:
        filler.unlink()


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def measure(folder: Path) -> int:
    """Bytes of a folder on a disk of 4 KiB pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def workplace(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> Path:
    named = {"base": json.dumps(str(tiny_base)), "a": json.dumps(str(tiny_adapters["plain"]))}
    (tmp_path / "recipe.toml").write_text(RECIPE.format(**named), encoding="utf-8")
    words = ("cat", "day", "sun", "moon", "mat", "cafe")
    texts = [json.dumps({"text": f"the {word} sat on the {other}. "}) for word in words for other in words[:3]]
    (tmp_path / "text.jsonl").write_text("\n".join(texts), encoding="utf-8")
    rows = [json.dumps({"prompt": f"the cat {number}\n", "completion": f"sat {number}"}) for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path


def test_an_export_onto_a_disk_that_is_full_at_some_point(workplace: Path) -> None:
    export = ["export", "recipe.toml", "--calibration", "text.jsonl", "--output"]
    kept = 0
    with small_disk(workplace / "disk") as disk, Commands(workplace) as commands:
        done = commands.run([*export, "whole"])
        assert done.code == 0, done.errors
        whole, size = listing(workplace / "whole"), measure(workplace / "whole")
        for point in range(POINTS):
            with leaving_free(disk, size * point // POINTS // 4096 * 4096):
                ended = commands.run([*export, disk / "bundle"])
                *rest, last = ended.errors.splitlines()
                assert ended.code == 5, ended.errors
                assert re.fullmatch(
                    rf"edgelora: no space left on the disk while writing {disk}\S*; free some and run again", last
                ), last
                assert not (disk / "bundle").exists()
                finished = any("what is finished is kept in" in line for line in rest)
                assert finished == (disk / ".bundle.edgelora-staging.journal").exists()
                kept += finished
            again = commands.run([*export, disk / "bundle"])
            assert again.code == 0, again.errors
            assert listing(disk / "bundle") == whole
            assert [path.name for path in disk.iterdir()] == ["bundle"]
            shutil.rmtree(disk / "bundle")
    print(f"full at {POINTS} points of {size} bytes; {kept} runs had finished weights, and the next ones went on")
    assert kept


def test_training_onto_a_disk_that_is_full_at_some_point(workplace: Path, tiny_base: Path) -> None:
    train = ["train", "--base", tiny_base, "--data", "rows.jsonl", *TRAIN, "--output"]
    name, went_on = "adapter_model.safetensors", 0
    with small_disk(workplace / "disk") as disk, Commands(workplace) as commands:
        done = commands.run([*train, "whole"])
        assert done.code == 0, done.errors
        weights = (workplace / "whole" / name).read_bytes()
        free = (1 << 20) + 3 * len(weights)  # train starts, as its adapter has room, and its checkpoints have none or little
        points = max(4, POINTS // 3)
        for point in range(points):
            with leaving_free(disk, free + point * 10 * len(weights) // points):
                ended = commands.run([*train, disk / "a"])
            assert ended.code in (0, 5), ended.errors
            if ended.code == 5:
                last = ended.errors.splitlines()[-1]
                assert str(disk) in last and "free some" in last, last
                went_on += (resume := (disk / "a.checkpoints").exists())
                again = commands.run([*train, disk / "a", *(["--resume"] if resume else [])])
                assert again.code == 0, again.errors
            assert (disk / "a" / name).read_bytes() == weights
            assert [path.name for path in disk.iterdir()] == ["a"]
            shutil.rmtree(disk / "a")
    print(f"full at {points} points; {went_on} runs went on from a checkpoint")
    assert went_on


def test_every_writer_names_its_file_when_a_file_is_too_large(
    workplace: Path, tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    """Under a limit such as `ulimit -f`: exit code 5, a name, and nothing half-written."""
    both = [f"--adapter=a={tiny_adapters['plain']}", f"--adapter=b={tiny_adapters['other']}"]
    two = [f"{one}:0.5" for one in both]
    shutil.copytree(tiny_adapters["plain"], workplace / "a")  # for init, which looks for adapters
    new = workplace / "new"
    writers: dict[str, tuple[int, list[object]]] = {
        "export": (20000, ["export", "recipe.toml", "--calibration", "text.jsonl", "--output", new]),
        "compose": (4096, ["compose", *two, "--output", new]),
        "gguf": (4096, ["compose", *two, "--output", workplace / "new.gguf", "--base", tiny_base]),
        "merge": (4096, ["compose", *two, "--merge-into", tiny_base, "--output", new]),
        "report": (4096, ["compose", "report", *both, "--output", new]),
        "train": (4096, ["train", "--base", tiny_base, "--data", "rows.jsonl", *TRAIN[:-2], "--output", new]),
        "init": (300, ["init", workplace / "new.toml"]),
    }
    before = sorted(path.name for path in workplace.iterdir())
    with Commands(workplace) as commands:
        for writer, (largest, arguments) in writers.items():
            ended = commands.run(arguments, largest=largest)
            last = ended.errors.splitlines()[-1]
            assert ended.code == 5, f"{writer}: {ended.errors}"
            assert re.search(rf"{workplace}/\S*new", last), f"{writer}: {last}"
            found = [path.name for path in workplace.iterdir() if not path.name.startswith(("output-", ".new.edgelora-staging"))]
            assert sorted(found) == before, writer
            assert [path.name for path in workplace.glob(".new*")] == [] or writer == "export", "finished weights are kept"
