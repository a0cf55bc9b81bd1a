"""A bundle appears whole or not at all: after a failure, a kill or a full disk, the old one is still there."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgelora_export.weights.full_disk import told_by_name
from edgelora_export.weights.publish import replace_folder, staged_folder, write_file
from edgelora_runtime import Bundle
from edgelora_runtime.errors import InputError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]


def publish_text(target: Path, text: str) -> None:
    with staged_folder(target, marker="marker") as folder:
        write_file(folder / "data", [text.encode()])
        write_file(folder / "marker", [b""])


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_new_folder_appears_with_its_parents(tmp_path: Path) -> None:
    publish_text(tmp_path / "a" / "b" / "out", "new")
    assert listing(tmp_path / "a" / "b" / "out") == {"data": b"new", "marker": b""}
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_the_target_does_not_exist_before_the_block_ends(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", marker="marker") as folder:
        write_file(folder / "marker", [b""])
        assert not (tmp_path / "out").exists()
        assert folder.parent == tmp_path, "a rename is atomic only within one file system"


def test_an_old_folder_is_replaced_whole(tmp_path: Path) -> None:
    publish_text(tmp_path / "out", "old")
    (tmp_path / "out" / "extra").write_text("of the old one")
    publish_text(tmp_path / "out", "new")
    assert listing(tmp_path / "out") == {"data": b"new", "marker": b""}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_replaced_without_an_exchange_call_too(tmp_path: Path) -> None:
    for name in ("out", "staging"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_text(name, encoding="utf-8")
    replace_folder(tmp_path / "staging", tmp_path / "out", exchange=lambda one, other: False)
    assert listing(tmp_path / "out") == {"data": b"staging"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_replacing_leaves_no_instant_without_a_target(tmp_path: Path) -> None:
    """A reader that looks again and again finds a marker every time."""
    publish_text(tmp_path / "out", "0")
    watcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os,sys\n"
            "misses = looks = 0\n"
            "print('ready', flush=True)\n"
            "while os.path.exists(sys.argv[2]) is False:\n"
            "    looks += 1\n"
            "    try: os.stat(sys.argv[1])\n"
            "    except FileNotFoundError: misses += 1\n"
            "print(misses, looks)",
            str(tmp_path / "out" / "marker"),
            str(tmp_path / "done"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watcher.stdout is not None
    watcher.stdout.readline()
    for round_ in range(100):
        publish_text(tmp_path / "out", str(round_))
    (tmp_path / "done").touch()
    misses, looks = map(int, watcher.communicate(timeout=30)[0].split())
    assert looks > 100
    assert misses == 0


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), OSError(errno.EIO, "bad disk")])
def test_a_failure_leaves_the_old_folder(tmp_path: Path, error: BaseException) -> None:
    publish_text(tmp_path / "out", "old")
    with pytest.raises(type(error)), staged_folder(tmp_path / "out", marker="marker") as folder:
        write_file(folder / "data", [b"half"])
        raise error
    assert listing(tmp_path / "out") == {"data": b"old", "marker": b""}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_a_file_manager_has_shown_is_empty(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_bytes(b"x")
    publish_text(tmp_path / "out", "new")
    assert listing(tmp_path / "out") == {"data": b"new", "marker": b""}


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    publish_text(tmp_path / "out", "new")
    assert listing(tmp_path / "out") == {"data": b"new", "marker": b""}


def make_file(target: Path) -> None:
    target.write_text("a file")


def make_other_folder(target: Path) -> None:
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")


def make_folder_with_a_folder_for_a_marker(target: Path) -> None:
    (target / "marker").mkdir(parents=True)
    (target / "thesis.txt").write_text("years of work")


@pytest.mark.parametrize("make", [make_file, make_other_folder, make_folder_with_a_folder_for_a_marker])
def test_what_is_not_ours_is_refused_and_kept(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "out")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match="choose another --output"):
        publish_text(tmp_path / "out", "new")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_a_link_to_a_bundle_gives_way_and_its_target_stays(tmp_path: Path) -> None:
    publish_text(tmp_path / "real", "old")
    (tmp_path / "out").symlink_to(tmp_path / "real", target_is_directory=True)
    publish_text(tmp_path / "out", "new")
    assert listing(tmp_path / "out")["data"] == b"new"
    assert listing(tmp_path / "real")["data"] == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "real"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    for name in (".out.edgelora-staging", ".out.edgelora-staging.old-1", ".out2.edgelora-staging"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_text("half")
    (tmp_path / ".out.edgelora-lock").touch()
    (tmp_path / ".out.edgelora-staging.journal").write_text("a plan\n")
    publish_text(tmp_path / "out", "old")  # brings back the target that was moved away, and then replaces it
    publish_text(tmp_path / "out", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out2.edgelora-staging", "out"]  # that is another target's


def test_a_target_that_a_killed_run_moved_away_is_put_back(tmp_path: Path) -> None:
    """As on a system without an exchange of folders, if the process dies between the two renames."""
    publish_text(tmp_path / ".out.edgelora-staging.old-1", "old")
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out", marker="marker"):
        raise RuntimeError("broken")
    assert listing(tmp_path / "out") == {"data": b"old", "marker": b""}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_that_look_like_patterns(tmp_path: Path) -> None:
    publish_text(tmp_path / "out [1]*", "old")
    publish_text(tmp_path / "out [1]*", "new")
    assert listing(tmp_path / "out [1]*")["data"] == b"new"


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_write_file_on_a_full_device(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=r"no space left on the disk while writing .*data; free some and run again"):
        write_file(tmp_path / "data", [b"x" * 100])
    assert not (tmp_path / "data").is_symlink(), "the file is removed"


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_write_file_beyond_the_limit_of_a_file() -> None:
    code = (
        "import resource, sys, tempfile\n"
        "from pathlib import Path\n"
        "from edgelora_export.weights.publish import write_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    try: write_file(Path(folder) / 'data', [b'x' * 100])\n"
        "    except OSError as error: print(error.exit_code, error)\n"
        "    print(list(Path(folder).iterdir()))\n"
    )
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    said, left = done.stdout.splitlines()
    assert said.startswith("5 this disk or `ulimit -f` takes no larger file while writing /")
    assert said.endswith("data; raise the limit and run again")
    assert left == "[]"


def test_a_full_disk_is_known_in_the_words_of_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(ResourceError, match=r"no space left on the disk while writing .*a\.safetensors"), told_by_name(file):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="os error 5"), told_by_name(file):
        raise RuntimeError("I/O error: Input/output error (os error 5)")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("full_at", [0, 1, 2, 3, 5, 7, 10, 13, 16, -1])
def test_a_full_disk_leaves_the_old_bundle(
    full_at: int, code: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one flush on the disk is full: from the n-th, or from the last one before the exchange."""
    from tests.tiny import export_base

    real, calls = os.fsync, 0

    def count(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        real(descriptor)

    monkeypatch.setattr(os, "fsync", count)
    export_base(tiny_base, tmp_path / "bundle")
    before = listing(tmp_path / "bundle")
    total, calls = calls, 0
    limit = full_at if full_at >= 0 else total - 2  # the last flush before the exchange
    assert limit < total, "the export has fewer flushes than this test expects"

    def fail(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError, match="no larger file" if code == errno.EFBIG else "no space left") as caught:
        export_base(tiny_base, tmp_path / "bundle", bits=4)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    assert listing(tmp_path / "bundle") == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_cannot_be_made_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(ResourceError, match="no space left"):
        publish_text(tmp_path / "out", "new")


# --- a killed writer --------------------------------------------------------------------------------------------------

WRITER = """\
import sys
from pathlib import Path
from edgelora_export.architectures import read_decoder
from edgelora_export.bundle.builder import build_bundle
from edgelora_export.bundle.plan import BundlePlan
from edgelora_export.plan.variants import Quantization, Variant
from edgelora_export.base.base import Base
base = Base.open(sys.argv[1])
sys.stdin.readline()
print("ready", flush=True)
while True:
    for bits in (4, 32):
        plan = BundlePlan(base, read_decoder(base.config), (Variant(f"bits{bits}"),), Quantization(bits=bits))
        build_bundle(plan, Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_export_leaves_the_old_bundle_or_the_new_one(tiny_base: Path, tmp_path: Path) -> None:
    """In each round a writer replaces the bundle over and over, until a kill at a random moment."""
    target = tmp_path / "bundle"
    path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))

    def start_writer() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tiny_base), str(target)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    moments = random.Random(0)
    found: set[str] = set()
    next_writer = start_writer()
    for round_ in range(20):
        writer = next_writer
        assert writer.stdin is not None
        assert writer.stdout is not None
        with writer.stdin, writer.stdout:
            writer.stdin.write(b"go\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == b"ready\n"
            if round_ < 19:
                next_writer = start_writer()  # it imports while this one works, and waits for its turn
            while round_ == 0 and not target.exists() and writer.poll() is None:
                time.sleep(0.01)  # so that all other rounds have a bundle to lose
            time.sleep(moments.uniform(0.0, 0.4))
            writer.kill()
            writer.wait()
        if target.exists():
            bundle = Bundle.open(target)
            assert bundle.verify() == []
            (variant,) = bundle.manifest.variants
            assert variant == f"bits{bundle.manifest.quantization.bits}"
            found.add(variant)
        else:
            assert not found, "a bundle that was there is gone"
        leftovers = [item.name for item in tmp_path.iterdir() if item != target]
        assert len(leftovers) <= 2, "the folder in the making and its lock: each run cleans up after the one before"
    assert found
