"""The shape of a fuzz harness, and the verdict on one input, by the rules of tests/attacks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from tests.attacks.worker import Watch, observe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

BUNDLE = Path(__file__).resolve().parents[1] / "runtime" / "bundle" / "golden" / "bundle"
NAMES = ("manifest", "graph", "adapter", "template", "tokenizer", "recipe", "prompts", "request")


@dataclass(frozen=True)
class Harness:
    """One kind of input.

    seeds: inputs to start from. mutate: changes an input with its form in mind, so that the change gets past the first check.
    use: does with an input what a user would do. It raises edgelora's errors for what it refuses, AssertionError where it takes
    what it must not. limit: bytes of an input.
    """

    seeds: Sequence[bytes]
    mutate: Callable[[bytes, Random], bytes]
    use: Callable[[bytes], object]
    limit: int = 1 << 15


def build_harness(name: str, folder: Path) -> Harness:
    """Builds a harness over the golden bundle, and uses its seeds once, so that no input is charged with imports.

    folder: an empty one, which it may write to.
    """
    harness: Harness = import_module(f"tests.fuzz.targets.{name}").build(BUNDLE, folder)
    for seed in harness.seeds:
        observe(lambda seed=seed: harness.use(seed))  # type: ignore[misc]
    return harness


class Judge:
    """The verdict on inputs of one harness. folder: the one that the harness writes to."""

    def __init__(self, harness: Harness, folder: Path) -> None:
        self._harness = harness
        self._folder = folder
        self._watch = Watch(BUNDLE, *(Path(name) for name in sys.path if name))

    def find_faults(self, raw: bytes) -> list[str]:
        """Uses an input. Returns one line for each thing that no input may do."""
        held = read_peak()
        with self._watch.on(self._folder):
            outcome = observe(lambda: self._harness.use(raw))
        outcome.bytes = read_peak() - held
        outcome.outside = list(dict.fromkeys(self._watch.noted))[:4]
        return outcome.excesses


def read_peak() -> int:
    """The most memory that the process has held, in bytes. 0 on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def join_parts(*parts: bytes) -> bytes:
    """Packs the files of an input, each behind its length."""
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def split_parts(raw: bytes, count: int) -> list[bytes]:
    """Unpacks what join_parts() packed, and takes any bytes: what is cut off is empty, and a length past the end is cut."""
    parts = []
    for _ in range(count):
        size = int.from_bytes(raw[:4], "little")
        parts.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    return parts
