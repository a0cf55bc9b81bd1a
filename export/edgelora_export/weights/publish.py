"""Publishes a folder in one step: builds it beside its target, flushes it to disk, and renames it to the target."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import os
import secrets
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora_export.weights.full_disk import told_by_name
from edgelora_export.weights.lock import locked
from edgelora_runtime.bundle.folder import is_empty
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

BLOB = ".bin"  # the suffix of a blob's name: <sha256>.bin
_STAGING = ".edgelora-staging"
_JOURNAL = ".journal"
_OLD = ".old-"


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file and flushes it to disk. Raises ResourceError, and leaves no file, if the disk is full."""
    with told_by_name(path):
        try:
            with path.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise


def write_hashed(folder: Path, content: bytes, suffix: str) -> str:
    """Writes a file named by the hash of its bytes, so that equal contents share one file. Returns its name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     name = write_hashed(Path(folder), b"same", ".bin")
    ...     assert write_hashed(Path(folder), b"same", ".bin") == name
    ...     print(len(os.listdir(folder)), "file:", name[:8], "…", name[-4:])
    1 file: 0967115f … .bin
    """
    name = f"{hashlib.sha256(content).hexdigest()}{suffix}"
    write_file(folder / name, [content])
    return name


@contextmanager
def staged_folder(target: Path, *, marker: str, plan: str | None = None) -> Iterator[Path]:
    """Yields a staging folder that becomes `target` if the block ends without an error, and is removed otherwise.

    Replaces an existing target in one step, and only if it is empty or holds the file `marker`. Other folders are not ours to
    delete. Removes what a killed run left beside the target. Meanwhile no other process can write the target.
    plan: one line that describes the folder to build. The staging folder then has a journal (see locate_journal) that starts with
    this line. Both stay if the block or the publishing fails, however it fails, once the journal has more lines. The error then
    has a note that says so. The next run with the same plan reuses the finished blobs.
    Raises InputError for a target that must not be replaced or that another process writes, ResourceError for a full disk.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100  (resolve() would follow a link that the user put there)
    check_target(target, marker=marker)
    with told_by_name(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target):
            staging = target.with_name(f".{target.name}{_STAGING}")
            with _kept_if_unfinished(staging):
                _clear_leftovers(staging, target, plan)
                staging.mkdir(exist_ok=True)
                if plan is not None and not locate_journal(staging).exists():
                    write_file(locate_journal(staging), [f"{plan}\n".encode()])
                yield staging
                _flush_folder(staging)
                replace_folder(staging, target)
            _flush_folder(target.parent)


def check_target(target: Path, *, marker: str) -> None:
    """Raises InputError for a target that staged_folder would not replace, so that it is told before any work."""
    if target.exists() and not (target.is_dir() and (is_empty(target) or (target / marker).is_file())):
        raise InputError(f"{target} exists and is not a folder with {marker}; choose another --output or remove it")


@contextmanager
def _kept_if_unfinished(staging: Path) -> Iterator[None]:
    """Removes a staging folder and its journal at the end, unless the block fails and the journal lists finished work."""
    journal, kept = locate_journal(staging), False
    try:
        yield
    except BaseException as error:
        kept = journal.is_file() and journal.read_bytes().count(b"\n") > 1  # the first line is the plan
        if kept:
            error.add_note(f"what is finished is kept in {staging}, and the same command goes on from there")
        raise
    finally:
        if not kept:
            journal.unlink(missing_ok=True)  # first: after the exchange it lists blobs that staging does not hold
            _remove(staging)


def locate_journal(staging: Path) -> Path:
    """Returns the path of a staging folder's journal, which lies beside the folder. See staged_folder."""
    return staging.with_name(staging.name + _JOURNAL)


def _clear_leftovers(staging: Path, target: Path, plan: str | None) -> None:
    """Removes what an earlier run left, except the finished blobs of the same plan and their journal.

    A target that was moved away by a run that was killed before it put another in its place is put back.
    """
    for old in staging.parent.glob(f"{glob.escape(staging.name)}{_OLD}*"):
        if target.exists():
            _remove(old)
        else:
            old.rename(target)
    if plan is None or not _has_plan(staging, plan):
        _remove(staging)
        locate_journal(staging).unlink(missing_ok=True)
        return
    for path in staging.iterdir():
        if path.suffix != BLOB:
            path.unlink()


def _has_plan(staging: Path, plan: str) -> bool:
    """True if a staging folder was made for this plan."""
    if not (staging.is_dir() and not staging.is_symlink() and locate_journal(staging).is_file()):
        return False
    with locate_journal(staging).open(encoding="utf-8", errors="replace") as file:
        return file.readline() == f"{plan}\n"


def _remove(path: Path) -> None:
    """Removes a folder, or a link to one. The exchange leaves a link there if the old target was a link."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return  # Windows cannot open folders, and NTFS journals renames
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange_folders(one: Path, other: Path) -> bool:
    """Swaps two folders in one atomic step. Returns False if the system or the file system cannot."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):
        return False
    first, second = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        at_fdcwd, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
        return bool(library.renameat2(at_fdcwd, first, at_fdcwd, second, rename_exchange) == 0)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        rename_swap = 2  # sys/stdio.h
        return bool(library.renamex_np(first, second, rename_swap) == 0)
    return False


def replace_folder(staging: Path, target: Path, *, exchange: Callable[[Path, Path], bool] = exchange_folders) -> None:
    """Renames the staging folder to the target. After an exchange the old target has staging's name.

    exchange: swaps two folders atomically and returns True, or returns False if the system cannot.
    """
    if not target.exists():
        staging.rename(target)
        return
    if exchange(staging, target):
        return
    # This system has no exchange. Between these two renames the target does not exist.
    old = staging.with_name(f"{staging.name}{_OLD}{secrets.token_hex(4)}")  # one that was in use may still be there
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
