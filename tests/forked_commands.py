"""The command line in processes that are forked from one with everything imported, so that hundreds of them can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("EDGELORA_KILLS", "12"))  # set EDGELORA_KILLS=200 for the claim of the docs
TERMINATIONS = KILLS // 4
WORDS = {signal.SIGKILL: (-signal.SIGKILL, None), signal.SIGTERM: (143, "edgelora: terminated")}
# Each line of the input has commands that run at once, each with a file for what it writes. The parent computes nothing, so that
# its children inherit no threads.
FORKER = """\
import contextlib, importlib, json, os, pkgutil, resource, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])  # so that no library spins with threads beside the tests'
import torch, transformers, trl, peft, bitsandbytes, pydantic, transformers.models.llama.modeling_llama, typer.rich_utils
import edgelora, edgelora_export, edgelora_runtime
from edgelora.cli.entry import main
for package in (edgelora, edgelora_export, edgelora_runtime):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
def start(arguments, output, largest):
    child = os.fork()
    if child:
        return child
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(f"{output}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.argv = ["edgelora", *arguments]
    try:
        main()
    except SystemExit as exit_:
        os._exit(exit_.code)
for line in sys.stdin:
    children = [start(*command) for command in json.loads(line)]
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, negative for a signal, its standard output and error, and its seconds."""

    code: int
    output: str
    errors: str
    seconds: float


class Commands:
    """Runs commands in a folder, from the block's start to its end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        path = os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))
        pipe = subprocess.PIPE
        environment = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-W", "ignore", "-c", FORKER]
        self._process = subprocess.Popen(command, cwd=self._folder, env=environment, stdin=pipe, stdout=pipe, text=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def run(
        self,
        arguments: Sequence[object],
        number: signal.Signals = signal.SIGKILL,
        seconds: float | None = None,
        *,
        largest: int | None = None,
    ) -> Ended:
        """Runs a command, and sends it a signal after so many seconds if it has not ended by then.

        largest: bytes of the largest file that it may write, as `ulimit -f` says it. None for no limit.
        """
        return self.run_at_once([arguments], number, seconds, largest=largest)[0]

    def run_at_once(
        self,
        commands: Sequence[Sequence[object]],
        number: signal.Signals = signal.SIGKILL,
        seconds: float | None = None,
        *,
        largest: int | None = None,
    ) -> list[Ended]:
        """Runs commands beside each other, and sends the first one a signal after so many seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        outputs = [str(self._folder / f"output-{place}") for place in range(len(commands))]
        asked = [(list(map(str, arguments)), output, largest) for arguments, output in zip(commands, outputs, strict=True)]
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        children, started = json.loads(self._process.stdout.readline()), time.monotonic()
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(children[0], number)
        codes, seconds = json.loads(self._process.stdout.readline()), time.monotonic() - started
        texts = [[Path(f"{output}.{stream}").read_text(encoding="utf-8") for stream in (1, 2)] for output in outputs]
        return [Ended(code, said, errors, seconds) for code, (said, errors) in zip(codes, texts, strict=True)]


def draw_signals(draw: random.Random) -> list[signal.Signals]:
    """Draws the order of all kills and terminations."""
    numbers = [signal.SIGKILL] * KILLS + [signal.SIGTERM] * TERMINATIONS
    draw.shuffle(numbers)
    return numbers
