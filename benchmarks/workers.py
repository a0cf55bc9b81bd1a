"""The engines' models and processes, and a description of the machine.

Missing models are built, and each engine has a worker.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora_runtime.residency.cache_folder import find_cache_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parent.parent
CACHE_VERSION = "1"  # increase it when the output of shapes.py or peer_models.py changes
OURS, REFERENCE = "edgelora", "transformers"


@dataclass(frozen=True)
class Peer:
    """The package and module of a peer's model, and the arguments of peer_models.py."""

    package: str
    module: str
    builder: tuple[str, ...]
    file: str


PEERS = {
    "onnxruntime-genai": Peer("onnxruntime-genai", "onnxruntime_genai", ("genai",), "genai"),
    "llama.cpp": Peer("llama-cpp-python", "llama_cpp", ("gguf", "--type", "q4_0"), "q4_0.gguf"),
    "llama.cpp-pure": Peer("llama-cpp-python", "llama_cpp", ("gguf", "--type", "q4_0-pure"), "q4_0-pure.gguf"),
}


class UnavailableError(Exception):
    """An engine is unavailable. The message says why."""


class Worker:
    """An engine in its own process, started once."""

    def __init__(self, python: str, engine: str, model: Path, threads: int, length: int) -> None:
        command = [python, "-m", "benchmarks.engines", engine, str(model)]
        command += ["--threads", str(threads), "--length", str(length)]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the worker)
        self.engine = engine
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        loaded = self._receive()
        self.version: str = loaded["version"]
        self.load_seconds: float = loaded["load_seconds"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends one request of engines.py and waits for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        """Ends the process by closing its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            raise UnavailableError(f"{self.engine} ended with status {status}: {last_line(self.errors.read())}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def start_workers(
    names: list[str], cache: Path, peers_python: str, threads: int, length: int, block_size: int = 32
) -> tuple[dict[str, Worker], dict[str, str]]:
    """Starts a worker per engine, building missing models.

    Also returns reasons for engines without one. block_size: of ours.
    """
    models: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            models[name] = find_model(name, peers_python, cache, block_size)
        except UnavailableError as reason:
            missing[name] = str(reason)
    workers: dict[str, Worker] = {}
    for name, model in models.items():
        read_once(model)
        try:
            workers[name] = Worker(peers_python if name in PEERS else sys.executable, name, model, threads, length)
        except UnavailableError as reason:
            missing[name] = str(reason)
    return workers, missing


def find_model(name: str, peers_python: str, cache: Path, block_size: int) -> Path:
    """The model of one engine."""
    if name == OURS:
        return export_bundle(cache, block_size)
    return cache / "checkpoint" if name == REFERENCE else build_peer(PEERS[name], peers_python, cache)


def export_bundle(cache: Path, block_size: int) -> Path:
    """Exports the checkpoint every time, so that the bundle is never older than the exporter."""
    recipe, bundle = cache / "recipe.toml", cache / "bundle"
    recipe.write_text(
        f"base = {json.dumps(str(cache / 'checkpoint'))}\n"
        f'[quantization]\nbits = 4\nblock_size = {block_size}\nmethod = "rtn"\n[variants.base]\nmix = {{}}\n',
        encoding="utf-8",
    )
    shutil.rmtree(bundle, ignore_errors=True)
    report("exporting the bundle")
    run_tool([sys.executable, "-m", "edgelora", "export", str(recipe), "--output", str(bundle)], "exported")
    return bundle


def build_peer(peer: Peer, python: str, cache: Path) -> Path:
    """Returns the peer's model.

    Builds it in the peers' environment unless this version of the peer has done so before.
    """
    probe = f"import importlib.metadata, {peer.module}; print(importlib.metadata.version('{peer.package}'))"
    found = subprocess.run([python, "-c", probe], capture_output=True, text=True)
    if found.returncode != 0:
        raise UnavailableError("not installed: pip install -r benchmarks/peers.txt, and pass its interpreter with --peers-python")
    model = cache / f"{peer.package}-{found.stdout.strip()}-{peer.file}"
    if not model.exists():
        report(f"building {model.name}")
        builder = [python, "-m", "benchmarks.peer_models", *peer.builder]
        run_tool([*builder, str(cache / "checkpoint"), str(model)], "built")
    return model


def run_tool(command: list[str], what: str) -> None:
    """Runs a command.

    Raises UnavailableError with the end of its output if it fails.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise UnavailableError(f"cannot be {what}: {last_line(done.stderr)}")


def read_once(model: Path) -> None:
    """Reads a model's files into the page cache.

    Loading is then equally warm for all engines.
    """
    for path in [model] if model.is_file() else [path for path in model.rglob("*") if path.is_file()]:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def last_line(text: str) -> str:
    """The last line of a program's error output."""
    return (text.strip().splitlines() or ["no message"])[-1]


def report(what: str) -> None:
    """Prints a status line on standard error."""
    print(f"{what} …", file=sys.stderr)


def default_cache() -> Path:
    """The default folder for the benchmarks' files."""
    return find_cache_folder() / "edgelora-bench"


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
    """The machine that figures come from."""
    model = platform.processor() or platform.machine()
    if sys.platform == "darwin":
        brand = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        model = brand.stdout.strip()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "physical_cores": count_cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


class OtherWork:
    """The share of the CPU that went to neither this process nor its workers.

    It counts from the start. Linux only. workers: each has a `process`.
    """

    def __init__(self, workers: Mapping[str, Any]) -> None:
        self.paths = [Path(f"/proc/{pid}/stat") for pid in (os.getpid(), *(w.process.pid for w in workers.values()))]
        self.start = self._read()

    def share(self) -> float | None:
        """The share, between 0 and 1. None if it cannot be measured."""
        now = self._read()
        if self.start is None or now is None:
            return None
        elapsed = (now[0] - self.start[0]) * (os.cpu_count() or 1)
        return max(0.0, (now[1] - self.start[1]) / elapsed) if elapsed else None

    def _read(self) -> tuple[float, float] | None:
        """Wall-clock seconds, and CPU seconds of other programs."""
        if sys.platform != "linux":
            return None
        # proc(5): user, nice, system, idle, iowait, irq, softirq, steal; and utime and stime of a process.
        fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = sum(fields) - fields[3] - fields[4]
        ours = sum(sum(map(int, path.read_text().rpartition(")")[2].split()[11:13])) for path in self.paths)
        return time.monotonic(), (busy - ours) / os.sysconf("SC_CLK_TCK")
