"""The cost before an app's first token: start time and package size.

    make test                                                        # sets up .venv
    .venv/bin/python -m benchmarks.first_token                       # exports pocket in int4 and times it
    .venv/bin/python -m benchmarks.first_token --bundle B --peers-python peers/bin/python

It measures the seconds of a fresh process and the bytes of the installed packages, ours and the peers'. Time runs from before
`import edgelora_runtime` to the first piece of text, in a new process each round. The files are in the system's page cache, as on
every start but the first. Sizes cover a package and all its requirements, by pip's lists of files, without compiled Python. A
peer is measured if --peers-python names an interpreter that has it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pocket import find_base
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora.formatting import format_bytes
from edgelora.machine import describe_machine
from edgelora_export.plan.variants import Quantization

OURS = "edgelora"
PEERS = ("llama-cpp-python", "onnxruntime-genai", "openvino-genai")
PARTS = ("import", "open", "first_token")
START = """
import time
times = [time.perf_counter()]
from edgelora_runtime import Runtime
times.append(time.perf_counter())
import sys
runtime = Runtime(sys.argv[1])
times.append(time.perf_counter())
next(runtime.stream(sys.argv[2], max_tokens=4, ignore_eos=True))
times.append(time.perf_counter())
print(*(after - before for before, after in zip(times, times[1:])))
"""
# Runs in the peers' interpreter, which has no edgelora.
SIZE = """
import json, re, sys
from importlib.metadata import PackageNotFoundError, distribution

def add(name, found):
    name = re.split(r"[ ;<>=!~(\\[]", name, maxsplit=1)[0].lower().replace("_", "-")
    if name in found:
        return
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return
    files = [package.locate_file(file) for file in package.files or () if file.suffix != ".pyc"]
    found[name] = sum(file.stat().st_size for file in files if file.is_file())
    for requirement in package.requires or ():
        if "extra ==" not in requirement:
            add(requirement, found)

found = {}
add(sys.argv[1], found)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Report:
    """The result of a run.

    seconds: medians over rounds, per part and in total. bytes: per package, with its requirements.
    """

    seconds: dict[str, float]
    bytes: dict[str, int]
    rounds: int
    machine: dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="the bundle to start; pocket in int4 if omitted")
    parser.add_argument("--prompt", default="once upon a time there was a")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--peers-python", type=Path, action="append", default=[], help="a Python interpreter with peers installed; repeatable"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bundle = arguments.bundle or make_bundle(Path(temporary) / "bundle")
        seconds = time_starts(bundle, arguments.prompt, arguments.rounds)
    sizes = {OURS: measure_size(Path(sys.executable), OURS)}
    for python in arguments.peers_python:
        sizes |= {peer: size for peer in PEERS if (size := measure_size(python, peer))}
    report = Report(seconds, sizes, arguments.rounds, describe_machine())
    if arguments.json:
        print_json(report)
        return
    print_table(f"median seconds of {arguments.rounds} starts", [*PARTS, "all"], [[f"{value:.3f}" for value in seconds.values()]])
    print_table("installed, with requirements", ["package", "size"], [[name, format_bytes(n)] for name, n in sizes.items()])


def make_bundle(output: Path) -> Path:
    """Exports an int4 bundle of the real base, with one variant."""
    print_note("exporting")
    recipe = Recipe(str(find_base()), {}, {"base": VariantRecipe({})}, Quantization(method="rtn"))
    export(recipe, output, gate="off")
    return output


def time_starts(bundle: Path, prompt: str, rounds: int) -> dict[str, float]:
    """Times the parts of a start, as median seconds per part and in total.

    Leaves out the first start, which fills the page cache.
    """
    found = []
    for _ in range(rounds + 1):
        command = [sys.executable, "-c", START, str(bundle), prompt]
        found.append([float(part) for part in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()])
    parts = zip(*found[1:], strict=True)
    return {
        **{name: statistics.median(part) for name, part in zip(PARTS, parts, strict=True)},
        "all": statistics.median(map(sum, found[1:])),
    }


def measure_size(python: Path, package: str) -> int:
    """Sums the bytes of a package and its requirements in an interpreter's environment.

    Returns 0 if it is not installed.
    """
    printed = subprocess.run([str(python), "-c", SIZE, package], check=True, capture_output=True, text=True).stdout
    return sum(json.loads(printed).values())


if __name__ == "__main__":
    main()
