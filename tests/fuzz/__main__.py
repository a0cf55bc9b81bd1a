"""Fuzzes one kind of input with atheris: python -m tests.fuzz NAME [--seconds N] [--corpus FOLDER]."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

import atheris

PACKAGES = ("edgelora", "edgelora_export", "edgelora_runtime")
SIZE = 4096  # MiB that the process may hold, which keeps its inputs
PATIENCE = 300  # seconds by the clock after which an input counts as hung; the limit on work is far lower (tests/attacks)


def main() -> None:
    """Runs until a finding or the end of the time. Writes the input of a finding to the working folder, and exits with 77."""
    os.environ["RUST_BACKTRACE"] = "0"
    with atheris.instrument_imports(include=list(PACKAGES)):
        from tests.fuzz.harness import NAMES, Judge, build_harness

        parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
        parser.add_argument("name", choices=NAMES)
        parser.add_argument("--seconds", type=int, default=600)
        parser.add_argument("--corpus", type=Path, help="a folder that keeps inputs which reach new code")
        chosen = parser.parse_args()
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{chosen.name}-"))
        (folder / "work").mkdir()
        harness = build_harness(chosen.name, folder / "work")
    (folder / "seeds").mkdir()
    for number, seed in enumerate(harness.seeds):
        (folder / "seeds" / str(number)).write_bytes(seed)
    judge = Judge(harness, folder / "work")

    def test_one(raw: bytes) -> None:
        if faults := judge.find_faults(raw):
            raise AssertionError("; ".join(faults))

    def mutate(raw: bytes, most: int, seed: int) -> bytes:
        changed = harness.mutate(raw, random.Random(seed))
        return changed if len(changed) <= most else atheris.Mutate(raw, most)

    corpus = chosen.corpus or folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    options = [
        *(f"-max_total_time={chosen.seconds}", f"-max_len={harness.limit}", f"-timeout={PATIENCE}", f"-rss_limit_mb={SIZE}"),
        *("-print_final_stats=1", "-len_control=0", "-report_slow_units=5"),
    ]
    atheris.Setup([sys.argv[0], str(corpus), str(folder / "seeds"), *options], test_one, custom_mutator=mutate)
    atheris.Fuzz()


main()
