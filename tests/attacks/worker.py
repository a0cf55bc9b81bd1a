"""Runs attacks one after another in this process, under limits, and says what became of each. Started by run.py.

Reads the numbers of attacks from standard input, a line each, and writes a line of JSON for each to standard output.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora_runtime import EdgeloraError
from edgelora_runtime.errors import LONGEST_MESSAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.attacks.attack import Attack

ROOT = Path(__file__).resolve().parents[2]
SECONDS, BYTES = 2.0, 1 << 30  # of the processor and of memory that one attack may take
_MEASURED = BYTES + (BYTES >> 1)  # address space past which allocations fail
_WATCHED = (
    "open",
    "os.listdir",
    "os.scandir",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.exec",
    "os.system",
)


@dataclass
class Outcome:
    """What became of an attack.

    error: the type and the message of what was raised, "" for nothing. seconds: of the processor. bytes: of memory above what
    the process had. outside: what was opened beyond the attack's folder.
    """

    error: str = ""
    message: str = ""
    typed: bool = False
    seconds: float = 0.0
    bytes: int = 0
    outside: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """What an attack must not do, one line each. Empty if the input was refused as it should be."""
        return ["was taken"] * (not self.error) + self.excesses

    @property
    def excesses(self) -> list[str]:
        """What no input may do, hostile or good, one line each."""
        wrong = []
        if self.error and not self.typed:
            wrong.append(f"raised {self.error}: {self.message[:200]!a}")
        elif self.error and (not self.message or not self.message.isprintable() or len(self.message) > LONGEST_MESSAGE + 1):
            wrong.append(f"was refused with the message {self.message[:200]!a}")
        if self.seconds > SECONDS:
            wrong.append(f"took {self.seconds:.1f} seconds")
        if self.bytes > BYTES:
            wrong.append(f"took {self.bytes >> 20} MiB")
        return wrong + [f"opened {name!a}" for name in self.outside]


class Watch:
    """An audit hook that notes what Python opens outside the folders that it may read, while it is on."""

    def __init__(self, *allowed: Path) -> None:
        self.folder: Path | None = None
        self.noted: list[str] = []
        own = (sys.prefix, sys.base_prefix, str(ROOT), "/proc/self/", "/proc/meminfo", "/proc/cpuinfo", "/dev/urandom", "/sys/")
        known = (*own, *map(str, allowed))
        self._own = tuple({*known, *(os.path.realpath(each) for each in known)})
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or event not in _WATCHED:
            return
        name = os.fsdecode(arguments[0]) if arguments and isinstance(arguments[0], str | bytes | os.PathLike) else ""
        if event == "open" and isinstance(arguments[0], int):
            return
        allowed = (*self._own, str(self.folder))
        if event in ("open", "os.listdir", "os.scandir") and (not name or os.path.abspath(name).startswith(allowed)):  # noqa: PTH100
            return
        self.noted.append(f"{event} {name}")

    @contextlib.contextmanager
    def on(self, folder: Path) -> Iterator[None]:
        self.folder, self.noted = folder, []
        try:
            yield
        finally:
            self.folder = None


def read_status(key: str) -> int:
    """A size in /proc/self/status, in bytes. 0 on other systems."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) << 10
    return 0


def reset_peak() -> None:
    """Sets the process's peak memory to what it has now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Lets allocations fail that would take far more than an attack may. The process keeps what it has, its limit too."""
    try:
        import resource
    except ImportError:  # on Windows
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    if held := read_status("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (held + _MEASURED, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run_attack(attack: Attack, watch: Watch) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="attack-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        attack.make(folder)
        reset_peak()
        held = read_status("VmRSS")
        with limited_memory(), watch.on(folder):
            outcome = observe(lambda: attack.open(folder))
        outcome.bytes = max(read_status("VmHWM") - held, 0)
        outcome.outside = list(dict.fromkeys(watch.noted))[:4]
    return outcome


def observe(use: Callable[[], object]) -> Outcome:
    """Uses an input. Returns what it raised, and the time that it took."""
    outcome = Outcome()
    started = time.process_time()
    try:
        use()
    except BaseException as error:  # Rust's panics are none of Exception
        outcome.error, outcome.message = type(error).__name__, str(error)
        outcome.typed = isinstance(error, EdgeloraError)
    outcome.seconds = time.process_time() - started
    return outcome


def main() -> None:
    from tests.attacks.listing import list_attacks, warm_up

    bundle = Path(sys.argv[1])
    attacks = list_attacks(bundle)
    warm_up(bundle)
    watch = Watch(bundle)  # a server reads texts of the good bundle when a request asks for them
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(run_attack(attacks[int(line)], watch))), flush=True)


if __name__ == "__main__":
    main()
