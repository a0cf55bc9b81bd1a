"""Kernels for a CPU: edgelora's own, where the package edgelora-kernels is installed, or onnxruntime's."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_runtime.bundle.manifest import QuantizationEntry

KERNELS = ("auto", "edgelora", "onnxruntime")

_MOST_BITS = 8
_LEAST_BLOCK = 32  # weights; activations are rounded in chunks of as many


@dataclass(frozen=True)
class Kernels:
    """Own kernels: an operator library for products with int4 weights, attention, and what live adapters add.

    Its operators take the place of onnxruntime's, and of the graph's functions, in the sessions that it is given to.
    They read weights as they lie in a bundle's blobs, so that nothing is packed when a session is made and all sessions and
    processes map the same bytes. instruction_set: what it runs on here.
    """

    library: Path
    instruction_set: str


def choose_kernels(name: str, grid: QuantizationEntry, *, provider: str, target: str) -> Kernels | None:
    """The kernels of a name for a bundle's grid: edgelora's, or None for onnxruntime's. "auto": edgelora's where they serve.

    Raises UsageError for "edgelora" where they do not.
    """
    if name not in KERNELS:
        raise UsageError(f"kernels {name!r} are not supported; use one of {', '.join(KERNELS)}")
    if name == "onnxruntime":
        return None
    reason = _why_not(grid, provider, target)
    if reason is not None and name == "edgelora":
        raise UsageError(f"kernels 'edgelora' {reason}; use 'auto' or 'onnxruntime'")
    return find_kernels() if reason is None else None


def _why_not(grid: QuantizationEntry, provider: str, target: str) -> str | None:
    if (provider, target) != ("cpu", "cpu"):
        return f"serve the cpu target on the cpu, not {target} on {provider}"
    if grid.bits > _MOST_BITS or grid.block_size < _LEAST_BLOCK:
        return (
            f"read up to {_MOST_BITS} bits in blocks of {_LEAST_BLOCK} and more; the bundle has {grid.bits} and {grid.block_size}"
        )
    return None if find_kernels() is not None else why_none()


@cache
def find_kernels() -> Kernels | None:
    """The machine's, where they are installed and have something for this machine."""
    if importlib.util.find_spec("edgelora_kernels") is None:
        return None
    import edgelora_kernels

    instruction_set = edgelora_kernels.instruction_set()
    return None if instruction_set is None else Kernels(edgelora_kernels.library_path(), instruction_set)


def why_none() -> str:
    """Why there are no kernels of edgelora's, as the rest of a sentence."""
    if importlib.util.find_spec("edgelora_kernels") is None:
        return "are not installed (pip install edgelora-kernels)"
    return "have nothing for this machine's instruction set"
