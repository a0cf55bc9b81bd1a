"""Publishes a folder in one step: builds it beside its target, flushes it to disk, and renames it to the target."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora_runtime.bundle.folder import is_empty
from edgelora_runtime.errors import InputError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

BLOB = ".bin"  # the suffix of a blob's name: <sha256>.bin
_STAGING = ".edgelora-staging"
_JOURNAL = ".journal"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file and flushes it to disk. Raises ResourceError, and leaves no file, if the disk is full."""
    try:
        with path.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if error.errno in _NO_SPACE:
            raise ResourceError(f"no space left on the disk of {path.parent} while writing {path.name}; free some") from error
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
    delete. Removes staging folders that a killed run left beside the target.
    plan: one line that describes the folder to build. The staging folder then has a journal (see locate_journal) that starts with
    this line. Both stay when the run is interrupted or killed, and the next run with the same plan reuses the finished blobs.
    Raises InputError for a target that must not be replaced, ResourceError for a full disk.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100  (resolve() would follow a link that the user put there)
    if target.exists() and not (target.is_dir() and (is_empty(target) or (target / marker).is_file())):
        raise InputError(f"{target} exists and is not a folder with {marker}; choose another --output or remove it")
    staging = target.with_name(f".{target.name}{_STAGING}-{os.getpid()}")
    kept = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target, staging, plan)
        staging.mkdir(exist_ok=True)
        if plan is not None and not locate_journal(staging).exists():
            write_file(locate_journal(staging), [f"{plan}\n".encode()])
        try:
            yield staging
        except (KeyboardInterrupt, SystemExit):
            kept = plan is not None
            raise
        locate_journal(staging).unlink(missing_ok=True)
        _flush_folder(staging)
        replace_folder(staging, target)
        _flush_folder(target.parent)
    except OSError as error:
        if error.errno in _NO_SPACE and not isinstance(error, ResourceError):
            raise ResourceError(f"no space left on the disk of {target}; free some and run again") from error
        raise
    finally:
        if not kept:
            _remove(staging)
            locate_journal(staging).unlink(missing_ok=True)


def locate_journal(staging: Path) -> Path:
    """Returns the path of a staging folder's journal, which lies beside the folder. See staged_folder."""
    return staging.with_name(staging.name + _JOURNAL)


def _clear_leftovers(target: Path, staging: Path, plan: str | None) -> None:
    """Removes what earlier runs left. Finished blobs of the same plan move to `staging`."""
    prefix = f".{target.name}{_STAGING}-"
    names = {path.name.removesuffix(_JOURNAL) for path in target.parent.glob(f"{glob.escape(prefix)}*")}
    leftovers = [target.with_name(name) for name in sorted(names) if _is_left_over(name.removeprefix(prefix))]
    same = next((folder for folder in leftovers if plan is not None and _has_plan(folder, plan)), None)
    for leftover in leftovers:
        if leftover != same:
            _remove(leftover)
            locate_journal(leftover).unlink(missing_ok=True)
    if same is not None:
        for path in same.iterdir():
            if path.suffix != BLOB:
                path.unlink()
        same.rename(staging)
        locate_journal(same).rename(locate_journal(staging))


def _is_left_over(pid: str) -> bool:
    """True if the process is gone. An earlier one may have had our own id, as every run in a container can."""
    return pid.isdigit() and (int(pid) == os.getpid() or not _is_running(int(pid)))


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


def _is_running(pid: int) -> bool:
    if sys.platform == "win32":
        return pid == os.getpid()  # os.kill would end the process on Windows
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
    old = staging.with_name(staging.name + ".old")
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
