"""A lock on an output: one process at a time writes it, and the system lets go of the lock whenever that process ends.

The lock is on a file beside the output, held by flock(2), or by LockFile on Windows. No process id decides, as ids repeat in
containers and after a restart.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # as flock and as LockFile say it


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the lock of an output inside a with block. Its file is removed at the end.

    Raises InputError if somebody else holds it, and where the file system has no locks. The folder of the output must exist.
    """
    path = locate_lock(target)
    descriptor = _acquire(path, target)
    try:
        yield
    finally:
        if sys.platform != "win32":  # there an open file cannot be removed, and elsewhere it must not be removed unlocked
            path.unlink(missing_ok=True)
        os.close(descriptor)
        if sys.platform == "win32":
            with contextlib.suppress(OSError):  # another process has opened it meanwhile
                path.unlink(missing_ok=True)


def locate_lock(target: Path) -> Path:
    """Returns the path of an output's lock, which lies beside it."""
    return target.with_name(f".{target.name}.edgelora-lock")


def _acquire(path: Path, target: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            if _is_same(path, descriptor):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in _HELD:
                raise InputError(f"another process is writing {target}; wait until it ends, or choose another --output") from None
            raise InputError(f"{target}: its file system has no locks ({error.strerror}); choose another --output") from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed the file after we had opened it


def _is_same(path: Path, descriptor: int) -> bool:
    """True if a path still leads to an open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def _lock(descriptor: int) -> None:
    """Locks an open file. Raises OSError, at once, if it is locked."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
