"""Full disks and limits on the size of a file: recognized whichever library reports them, and told with the file's name."""

from __future__ import annotations

import errno
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgelora_runtime.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors is written in Rust, and says it in words: "… I/O error: No space left on device (os error 28)"
_IN_WORDS = re.compile(rf"\(os error ({'|'.join(map(str, _FULL))})\)")


def is_full(error: BaseException) -> bool:
    """True for a full disk, a used up quota, or a file that is larger than the file system or `ulimit -f` allows."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return _IN_WORDS.search(str(error)) is not None


@contextmanager
def told_by_name(path: Path) -> Iterator[None]:
    """Turns a full disk, inside a with block, into a ResourceError that names a file or folder. Leaves other errors alone."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ResourceError) or not is_full(error):
            raise
        told = ResourceError(f"{_explain(error)} while writing {path}; {_advise(error)} and run again")
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        raise told from error


def _explain(error: Exception) -> str:
    return "this disk or `ulimit -f` takes no larger file" if _is_too_large(error) else "no space left on the disk"


def _advise(error: Exception) -> str:
    return "raise the limit" if _is_too_large(error) else "free some"


def _is_too_large(error: Exception) -> bool:
    return getattr(error, "errno", None) == errno.EFBIG or f"(os error {errno.EFBIG})" in str(error)
