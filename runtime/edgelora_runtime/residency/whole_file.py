"""Writes a file whole or not at all."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

from edgelora_runtime.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from pathlib import Path


def write_whole(path: Path, raw: bytes) -> None:
    """Writes a file beside its place and renames it, so that a failure leaves the earlier one.

    Raises UsageError for a path that is a folder, a device or anything else that is no plain file, ResourceError if the file
    cannot be written.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a plain file; name another path")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"{path} cannot be written ({error.strerror}); an earlier file is unchanged") from error
