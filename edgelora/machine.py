"""The machine that figures come from: its processor, how fast its memory is read, and what other programs take of it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

_BANDWIDTH_BYTES = 1 << 28  # read by all threads together, several times what a cache holds
_BANDWIDTH_ROUNDS = 5


def count_cores() -> int:
    """Counts the physical cores that this process may use.

    Without Linux's topology files, counts the logical ones.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.exists() else str(cpu))
    return len(siblings)


def describe_machine() -> dict[str, Any]:
    """Returns the processor's name, its cores, the system and the version of Python."""
    model = platform.processor() or platform.machine()
    if sys.platform == "darwin":
        brand = subprocess.run(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        model = brand.stdout.strip() or model
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "physical_cores": count_cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def measure_bandwidth(threads: int) -> float:
    """Measures the bytes per second that `threads` threads together read from memory, best of five.

    They read arrays too large for any cache, which takes some tenths of a second in all.
    """
    size = _BANDWIDTH_BYTES // threads // 8
    arrays = [np.ones(size, np.int64) for _ in range(threads)]
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_BANDWIDTH_ROUNDS):
            start = time.perf_counter()
            list(pool.map(np.max, arrays))  # numpy releases the GIL
            seconds.append(time.perf_counter() - start)
    return threads * size * 8 / min(seconds)


class OtherWork:
    """The share of the CPU that goes to neither this process nor its workers. Linux only."""

    def __init__(self, workers: Iterable[int]) -> None:
        """Starts counting. workers: ids of processes that are not other work."""
        self._paths = [Path(f"/proc/{pid}/stat") for pid in (os.getpid(), *workers)]
        self._ours: dict[Path, int] = {}  # ticks of each process, as last read
        self._start = self._read()

    def share(self) -> float | None:
        """Returns the share since the start, between 0 and 1. None if it cannot be measured."""
        now = self._read()
        if self._start is None or now is None:
            return None
        elapsed = (now[0] - self._start[0]) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (now[1] - self._start[1]) / elapsed)) if elapsed else None

    def _read(self) -> tuple[float, float] | None:
        """Reads wall-clock seconds, and CPU seconds of other programs."""
        if sys.platform != "linux":
            return None
        # proc(5): user, nice, system, idle, iowait, irq, softirq, steal; and utime and stime of a process.
        fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = sum(fields) - fields[3] - fields[4]
        for path in self._paths:
            if path.exists():  # a worker that has ended counts as it was last read
                self._ours[path] = sum(map(int, path.read_text().rpartition(")")[2].split()[11:13]))
        return time.monotonic(), (busy - sum(self._ours.values())) / os.sysconf("SC_CLK_TCK")
