"""A staging folder with finished work stays after any failure, and the next run of the same plan goes on from it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from edgelora_export.weights.publish import locate_journal, staged_folder, write_file
from edgelora_runtime.errors import ResourceError

if TYPE_CHECKING:
    from pathlib import Path


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


PLAN = "a plan"


def finish_one(folder: Path) -> None:
    write_file(folder / "blob.bin", [b"finished"])
    with locate_journal(folder).open("a", encoding="utf-8") as journal:
        journal.write("blob.bin\n")


@pytest.mark.parametrize(
    "error", [RuntimeError("refused"), KeyboardInterrupt(), MemoryError(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_any_failure_keeps_what_is_finished_and_says_so(tmp_path: Path, error: BaseException) -> None:
    raised = pytest.raises((type(error), ResourceError))
    with raised as caught, staged_folder(tmp_path / "out", marker="marker", plan=PLAN) as folder:
        finish_one(folder)
        write_file(folder / "half.onnx", [b"half"])
        raise error
    assert caught.value.__notes__ == [f"what is finished is kept in {folder}, and the same command goes on from there"]
    with staged_folder(tmp_path / "out", marker="marker", plan=PLAN) as folder:
        assert listing(folder) == {"blob.bin": b"finished"}
        assert locate_journal(folder).read_text(encoding="utf-8") == f"{PLAN}\nblob.bin\n"
        write_file(folder / "marker", [b""])
    assert listing(tmp_path / "out") == {"blob.bin": b"finished", "marker": b""}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_before_anything_is_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught, staged_folder(tmp_path / "out", marker="marker", plan=PLAN):
        raise RuntimeError("refused")
    assert not hasattr(caught.value, "__notes__")
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_keeps_what_is_finished(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, staged_folder(tmp_path / "out", marker="marker", plan=PLAN) as folder:
        finish_one(folder)
        staging = folder.rename(tmp_path / "elsewhere")  # so that there is nothing to rename
    assert len(caught.value.__notes__) == 1
    staging.rename(folder)
    with staged_folder(tmp_path / "out", marker="marker", plan=PLAN) as folder:
        assert listing(folder) == {"blob.bin": b"finished"}
