"""Freed memory returns to the system on request."""

from __future__ import annotations

import ctypes

import pytest

from edgelora_runtime.residency.memory import find_anonymous_memory, return_freed_memory

BLOCK, COUNT = 64 << 10, 1000


def has_malloc_trim() -> bool:
    try:
        return hasattr(ctypes.CDLL(None), "malloc_trim")
    except (OSError, TypeError):
        return False


@pytest.mark.skipif(not has_malloc_trim(), reason="only glibc can be asked to give memory back")
def test_freed_memory_below_an_allocation_is_returned() -> None:
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.free.argtypes = (ctypes.c_void_p,)
    blocks = [library.malloc(BLOCK) for _ in range(COUNT)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for block in blocks[:-1]:
        library.free(block)
    kept = find_anonymous_memory() or 0
    return_freed_memory()
    assert kept - (find_anonymous_memory() or 0) > BLOCK * COUNT // 2
    library.free(blocks[-1])
