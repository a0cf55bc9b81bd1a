"""Memory sizes, free memory, a process's memory, and control over glibc's freed memory."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora_runtime.arguments import is_whole, show
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_ARENA_MAX = -8  # malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_bytes(size: int | str | None) -> int | None:
    """Parses a size such as 4294967296, "4GiB" or "512 MB" to bytes.

    Both spellings mean powers of 1024. None stays None.
    """
    if size is None:
        return None
    is_known = isinstance(size, str) or (is_whole(size) and size < 1 << 63)
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]+)?)\s*([KMG]?)(?:i?B)?\s*", str(size), re.IGNORECASE) if is_known else None
    if match is None:
        raise UsageError(f"memory size {show(size)} is not understood; write a number of bytes, or a size such as 4GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def find_free_memory() -> int | None:
    """Returns the bytes available without swapping, or None if the system does not say.

    A control group's limit counts if there is one.
    """
    if sys.platform == "win32":
        return _ask_windows()
    free = [value for value in (_read_meminfo(), _read_cgroup()) if value is not None]
    if free:
        return min(free)
    try:  # macOS's sysconf does not count reclaimable memory: half of all memory is a cautious estimate
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return None


def find_anonymous_memory(process: int | str = "self") -> int | None:
    """Returns the bytes of a process that no file backs (RssAnon of Linux's /proc).

    Returns None if there is no such process or figure.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), None)


def return_freed_memory() -> None:
    """Returns freed memory to the system.

    glibc keeps freed memory for later allocations, and whole pages of it as long as anything is allocated above them. Does
    nothing with another libc.
    """
    library = _find_glibc()
    if library is not None:
        library.malloc_trim(0)


def share_freed_memory() -> None:
    """Makes all threads of this process allocate from one heap, so that what one has freed serves the others.

    glibc gives each thread a heap of its own, and each keeps what its thread once needed. Call it before threads start. Does
    nothing with another libc (M_ARENA_MAX in mallopt(3)).
    """
    library = _find_glibc()
    if library is not None:
        library.mallopt(_ARENA_MAX, 1)


@contextmanager
def reuse_freed_memory() -> Iterator[None]:
    """Keeps freed memory for the next allocation, which then causes no page faults.

    Does nothing without glibc. For work that allocates and frees large buffers again and again. The settings hold for the whole
    process. Afterwards they are the largest values that glibc's own tuning reaches (M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in
    mallopt(3)).
    """
    library = _find_glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, 1 << 30)
    library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, 32 << 20)
        library.mallopt(_TRIM_THRESHOLD, 64 << 20)
        library.malloc_trim(0)


def _find_glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def _read_meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _read_cgroup() -> int | None:
    """Returns the bytes that a container may still use (control groups v2).

    They are its limit less its use, not counting the page cache.
    """
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        stat = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        if limit == "max":
            return None
        cached = next((int(line.split()[1]) for line in stat if line.startswith("file ")), 0)
        return max(0, int(limit) - int(used) + cached)
    except (OSError, ValueError):
        return None


def _ask_windows() -> int | None:
    class Status(ctypes.Structure):
        """MEMORYSTATUSEX: https://learn.microsoft.com/windows/win32/api/sysinfoapi/ns-sysinfoapi-memorystatusex."""

        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *(
                (name, ctypes.c_ulonglong)
                for name in ("total", "available", "page", "page_free", "virtual", "virtual_free", "more")
            ),
        )

    status = Status(length=ctypes.sizeof(Status))
    kernel: object = getattr(ctypes, "windll").kernel32  # noqa: B009  (absent from other systems' stubs)
    if not getattr(kernel, "GlobalMemoryStatusEx")(ctypes.byref(status)):  # noqa: B009
        return None
    return int(status.available)
