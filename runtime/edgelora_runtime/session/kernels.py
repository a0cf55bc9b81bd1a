"""The choice of CPU kernels: onnxruntime's, or edgelora's if edgelora-kernels is installed."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from edgelora_runtime.arguments import show
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_runtime.bundle.manifest import QuantizationEntry

KERNELS = ("auto", "edgelora", "onnxruntime")

INTERFACE = 2  # of the operators, as edgelora_kernels numbers it; 2 has attention and live adapters for several texts in a step
FORCED = "EDGELORA_INSTRUCTION_SET"  # the environment variable by which edgelora_kernels takes a lesser set
_MAX_BITS = 8
_MIN_BLOCK = 32  # weights; activations are rounded in chunks of this size


@dataclass(frozen=True)
class Kernels:
    """edgelora's kernels, as an operator library.

    It covers products with int4 weights, attention, and live adapters. In sessions that register it, its operators replace
    onnxruntime's and the graph's functions. They read weights as a bundle's blobs store them, so nothing is packed when a session
    opens, and all sessions and processes map the same bytes. instruction_set: the one that it uses on this machine.
    """

    library: Path
    instruction_set: str


def choose_kernels(name: str, grid: QuantizationEntry, *, provider: str, target: str) -> Kernels | None:
    """Chooses the kernels for a bundle's grid: edgelora's, or None for onnxruntime's.

    name: one of KERNELS. "auto" prefers edgelora's. Raises UsageError for "edgelora" if edgelora's kernels cannot run the bundle.
    """
    if not isinstance(name, str) or name not in KERNELS:
        raise UsageError(f"kernels {show(name)} are not supported; use one of {', '.join(KERNELS)}")
    if name == "onnxruntime":
        return None
    reason = _why_not(grid, provider, target)
    if reason is not None and name == "edgelora":
        raise UsageError(f"kernels 'edgelora' {reason}; use 'auto' or 'onnxruntime'")
    return find_kernels() if reason is None else None


def _why_not(grid: QuantizationEntry, provider: str, target: str) -> str | None:
    if (provider, target) != ("cpu", "cpu"):
        return f"serve the cpu target on the cpu, not {target} on {provider}"
    if grid.bits > _MAX_BITS or grid.block_size < _MIN_BLOCK:
        return f"read up to {_MAX_BITS} bits in blocks of {_MIN_BLOCK} or more; the bundle has {grid.bits} and {grid.block_size}"
    return None if find_kernels() is not None else explain_absence()


@cache
def find_kernels() -> Kernels | None:
    """Finds edgelora's kernels, if they are installed, fit this edgelora and support this machine."""
    if importlib.util.find_spec("edgelora_kernels") is None or _read_interface() != INTERFACE:
        return None
    import edgelora_kernels

    instruction_set = edgelora_kernels.instruction_set()
    return None if instruction_set is None else Kernels(edgelora_kernels.library_path(), instruction_set)


def explain_absence() -> str:
    """Returns the reason find_kernels() finds none, as the rest of a sentence."""
    if importlib.util.find_spec("edgelora_kernels") is None:
        return "are not installed (pip install edgelora-kernels)"
    if (found := _read_interface()) != INTERFACE:
        return f"have interface {found}, and this edgelora needs {INTERFACE}; install both packages anew, from one source"
    return "do not support this machine's instruction set"


def explain_choice() -> str:
    """Returns whose kernels "auto" takes for bundles of 4 and 8 bits on this CPU, and why, as one phrase."""
    found = find_kernels()
    if found is None:
        return f"onnxruntime's, as edgelora's {explain_absence()}"
    if os.environ.get(FORCED) == found.instruction_set:
        return f"edgelora's ({found.instruction_set}), the instruction set that {FORCED} names"
    return f"edgelora's ({found.instruction_set}), the best instruction set of theirs that this CPU has"


def _read_interface() -> int:
    """Reads the number of the installed kernels' interface. Those before the first number have 1."""
    import edgelora_kernels

    return edgelora_kernels.interface() if hasattr(edgelora_kernels, "interface") else 1
