"""The models of the engines that decode.py and switching.py compare, and their workers. Missing models are built."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from edgelora.peers.models import GENAI, LLAMA_CPP, OURS, PACKAGES, list_files, read_once
from edgelora.peers.worker import ENGINES, UnavailableError, Worker, last_line
from edgelora_runtime.residency.cache_folder import find_cache_folder

ROOT = Path(__file__).resolve().parent.parent
CACHE_VERSION = "1"  # increase it when the output of shapes.py or peer_models.py changes
REFERENCE = "transformers"


@dataclass(frozen=True)
class Peer:
    """An engine, its package and module, and the arguments of peer_models.py that make its model."""

    engine: str
    package: str
    module: str
    builder: tuple[str, ...]
    file: str


PEERS = {
    "onnxruntime-genai": Peer(GENAI, PACKAGES[GENAI], "onnxruntime_genai", ("genai",), "genai"),
    "llama.cpp": Peer(LLAMA_CPP, PACKAGES[LLAMA_CPP], "llama_cpp", ("gguf", "--type", "q4_0"), "q4_0.gguf"),
    "llama.cpp-pure": Peer(LLAMA_CPP, PACKAGES[LLAMA_CPP], "llama_cpp", ("gguf", "--type", "q4_0-pure"), "q4_0-pure.gguf"),
}


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
            missing[name] = reason.reason
    workers: dict[str, Worker] = {}
    for name, model in models.items():
        read_once(list_files(model))
        python = peers_python if name in PEERS else sys.executable
        script = Path(__file__).with_name("reference_engine.py") if name == REFERENCE else ENGINES
        engine = PEERS[name].engine if name in PEERS else name
        try:
            workers[name] = Worker(engine, model, python=python, threads=threads, length=length, script=script)
        except UnavailableError as reason:
            missing[name] = reason.reason
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
    run_tool([sys.executable, "-m", "edgelora", "export", str(recipe), "--output", str(bundle)], OURS, "exported")
    return bundle


def build_peer(peer: Peer, python: str, cache: Path) -> Path:
    """Returns the peer's model.

    Builds it in the peers' environment unless this version of the peer has done so before.
    """
    probe = f"import importlib.metadata, {peer.module}; print(importlib.metadata.version('{peer.package}'))"
    found = subprocess.run([python, "-c", probe], capture_output=True, text=True)
    if found.returncode != 0:
        reason = "not installed: pip install -r benchmarks/peers.txt, and pass its interpreter with --peers-python"
        raise UnavailableError(peer.engine, reason)
    model = cache / f"{peer.package}-{found.stdout.strip()}-{peer.file}"
    if not model.exists():
        report(f"building {model.name}")
        builder = [python, "-m", "benchmarks.peer_models", *peer.builder]
        run_tool([*builder, str(cache / "checkpoint"), str(model)], peer.engine, "built")
    return model


def run_tool(command: list[str], engine: str, what: str) -> None:
    """Runs a command.

    Raises UnavailableError with the end of its output if it fails.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise UnavailableError(engine, f"cannot be {what}: {last_line(done.stderr)}")


def report(what: str) -> None:
    """Prints a status line on standard error."""
    print(f"{what} …", file=sys.stderr)


def default_cache() -> Path:
    """The default folder for the benchmarks' files."""
    return find_cache_folder() / "edgelora-bench"
