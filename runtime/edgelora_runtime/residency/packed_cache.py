"""Packed weights and LoRA inputs on disk, mapped by every session and process that uses them.

onnxruntime packs a graph's int4 weights for the CPU it runs on, into private memory of each session. Written to a file, the
packed weights are mapped instead: another session costs little private memory, and the system pages weights in and out like any
file. The LoRA inputs of live variants are stored the same way. Packed files depend on the CPU and on onnxruntime's version, so
they are made where they are used and never shipped.

An entry is a folder named by a digest of everything its content depends on. It holds GRAPH and WEIGHTS as onnxruntime writes
them, or INPUTS, concatenated, with their SHAPES. It also holds ENTRY, the sizes of the files. It is made under another name and
renamed once it is complete, so several processes may make the same one. Entries are trusted like the user's own files: a folder
that others can write is refused, and blobs are checked against the manifest's hashes before they are packed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import secrets
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from edgelora_runtime.arguments import check_path
from edgelora_runtime.bundle.folder import hash_file
from edgelora_runtime.errors import IntegrityError, UsageError
from edgelora_runtime.residency.cache_folder import find_cache_folder
from edgelora_runtime.residency.memory import parse_bytes
from edgelora_runtime.session.providers import CPU, open_session

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgelora_runtime.bundle.choice import LiveWeights
    from edgelora_runtime.bundle.folder import Bundle
    from edgelora_runtime.bundle.manifest import StageEntry
    from edgelora_runtime.session.factors import LoraInputs

GRAPH, WEIGHTS, INPUTS, SHAPES, ENTRY = "graph.onnx", "weights.bin", "inputs.npy", "shapes.json", "entry.json"
_LAYOUT = 1  # of an entry
_UNFINISHED, _LEAVING = ".unfinished-", ".leaving-"
_ABANDONED = 3600  # seconds after which an unfinished entry counts as abandoned
_DISK_SHARE = 3  # upper bound of an entry's bytes per byte of its blobs (measured: 2.4)


class PackedCache:
    """A folder of packed weights.

    folder: by default one in the platform's cache folder. budget: bytes, as a number or like "8GiB". The least recently used
    entries are deleted first. Pass it as Runtime(packed_cache=…). Several runtimes and processes may share one folder. Raises
    UsageError for a folder that cannot be made, belongs to someone else, or can be written by others.
    """

    def __init__(self, folder: str | Path | None = None, *, budget: int | str = "16GiB") -> None:
        self.folder = find_packed_folder() if folder is None else check_path("PackedCache", "folder", folder)
        self._budget = parse_bytes(budget) or 0
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = self.folder.stat()
        except OSError as error:
            raise UsageError(f"the packed cache {self.folder} cannot be used ({error.strerror}); name another folder") from error
        if sys.platform != "win32" and (info.st_uid != os.getuid() or info.st_mode & 0o022):
            raise UsageError(f"others can write the packed cache {self.folder}; name a folder that only you can write")

    def find(self, bundle: Bundle, graph: StageEntry) -> Path | None:
        """Returns the graph that maps packed weights, if there is an entry.

        Marks the entry as just used.
        """
        entry = self._find(_name_graph(bundle, graph))
        return None if entry is None else entry / GRAPH

    def write(self, bundle: Bundle, graph: StageEntry) -> Path | None:
        """Packs a graph's weights and writes them.

        Returns None if that fails or they are too large for the budget or the disk. Takes several times as long as loading and,
        meanwhile, the memory of two sessions. Raises IntegrityError for a bundle that differs from its manifest.
        """
        limit = _DISK_SHARE * sum(bundle.manifest.files[name].size for name in graph.blobs)
        if limit > self._budget:
            return None
        broken = [name for name in graph.blobs if hash_file(bundle.path(name)) != bundle.manifest.files[name].sha256]
        if broken:
            raise IntegrityError(f"bundle {bundle.folder}: {', '.join(broken)} differ from the manifest; copy the bundle again")
        self._write(_name_graph(bundle, graph), limit, lambda folder: _write_graph(bundle.path(graph.file), folder))
        return self.find(bundle, graph)

    def find_inputs(self, bundle: Bundle, mix: LiveWeights, lora_type: np.dtype[Any]) -> LoraInputs | None:
        """Returns the mapped LoRA inputs of a live mix in that type, if there is an entry."""
        entry = self._find(_name_inputs(bundle, mix, lora_type))
        return None if entry is None else _map_inputs(entry)

    def write_inputs(self, bundle: Bundle, mix: LiveWeights, lora_type: np.dtype[Any], inputs: LoraInputs) -> LoraInputs | None:
        """Writes LoRA inputs and maps them.

        Returns None if they are too large for the budget or the disk.
        """
        size = sum(array.nbytes for array in inputs.values())
        self._write(_name_inputs(bundle, mix, lora_type), size, lambda folder: _write_inputs(inputs, folder))
        return self.find_inputs(bundle, mix, lora_type)

    def measure(self) -> int:
        """Returns the bytes of all entries."""
        return sum(_measure(entry) for entry in self._entries())

    def clear(self) -> None:
        """Deletes all entries.

        Sessions that map one keep it until they close. On Windows, so does the cache.
        """
        for entry in self._entries():
            self._delete(entry)

    def _find(self, name: str) -> Path | None:
        entry = self.folder / name
        if not _is_whole(entry):
            return None
        with contextlib.suppress(OSError):
            os.utime(entry / ENTRY)
        return entry

    def _write(self, name: str, limit: int, fill: Callable[[Path], None]) -> None:
        """Makes an entry of at most `limit` bytes.

        Makes none if that is too much or writing fails.
        """
        if limit > self._budget:
            return
        entry = self.folder / name
        with contextlib.suppress(OSError, IntegrityError):  # the disk is full, as Python or onnxruntime reports it
            self._sweep()
            self._make_room(limit)
            if limit > shutil.disk_usage(self.folder).free:
                return
            with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=self.folder, ignore_cleanup_errors=True) as unfinished:
                folder = Path(unfinished)
                fill(folder)
                sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
                (folder / ENTRY).write_text(json.dumps(sizes), encoding="ascii")
                self._publish(folder, entry)

    def _publish(self, folder: Path, entry: Path) -> None:
        """Renames a folder to the entry.

        An entry that another process published meanwhile stays, unless it is damaged.
        """
        try:
            folder.rename(entry)
        except OSError:
            if not _is_whole(entry):
                self._delete(entry)
                folder.rename(entry)

    def _entries(self) -> list[Path]:
        """Returns the entries, least recently used first."""
        used = []
        for entry in self.folder.iterdir():
            if entry.name.startswith("."):
                continue
            with contextlib.suppress(OSError):
                used.append(((entry / ENTRY).stat().st_mtime_ns, entry))
        return [entry for _, entry in sorted(used)]

    def _sweep(self) -> None:
        """Deletes what killed processes left."""
        for folder in (*self.folder.glob(f"{_UNFINISHED}*"), *self.folder.glob(f"{_LEAVING}*")):
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(folder, ignore_errors=True)

    def _make_room(self, size: int) -> None:
        entries = self._entries()
        held = sum(map(_measure, entries))
        while entries and held + size > self._budget:
            held -= _measure(entries[0])
            self._delete(entries.pop(0))

    def _delete(self, entry: Path) -> None:
        """Deletes an entry. It is renamed first, so that nobody finds half of it."""
        leaving = self.folder / f"{_LEAVING}{entry.name}-{secrets.token_hex(4)}"
        with contextlib.suppress(OSError):
            entry.rename(leaving)
            shutil.rmtree(leaving, ignore_errors=True)


def find_packed_folder() -> Path:
    """Returns the default folder for packed weights."""
    return find_cache_folder() / "edgelora" / "packed"


def _name_graph(bundle: Bundle, graph: StageEntry) -> str:
    files = [bundle.manifest.files[name].sha256 for name in (graph.file, *graph.blobs)]
    return _digest(onnxruntime=ort.__version__, cpu=_describe_cpu(), files=files)


def _name_inputs(bundle: Bundle, mix: LiveWeights, lora_type: np.dtype[Any]) -> str:
    manifest = bundle.manifest
    files = [manifest.adapters[name].file for name, _ in mix]
    adapters = [(manifest.files[file].sha256, weight) for file, (_, weight) in zip(files, mix, strict=True) if file is not None]
    return _digest(slots=[asdict(slot) for slot in manifest.live_slots], adapters=adapters, type=lora_type.name)


def _digest(**parts: object) -> str:
    return hashlib.sha256(json.dumps({"layout": _LAYOUT, **parts}).encode()).hexdigest()[:32]


@cache
def _describe_cpu() -> str:
    """Returns the CPU's instructions, as far as the system lists them.

    onnxruntime chooses kernels by these.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(" ".join(line.split()) for line in lines if line.lower().startswith(("flags", "features")))
    return f"{platform.machine()} {platform.processor()}"


def _write_graph(graph: Path, folder: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # fatal only: onnxruntime warns that such a graph is for this machine only
    options.optimized_model_filepath = str(folder / GRAPH)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    open_session(graph, options, CPU)


def _write_inputs(inputs: LoraInputs, folder: Path) -> None:
    np.save(folder / INPUTS, np.concatenate([array.reshape(-1) for array in inputs.values()]), allow_pickle=False)
    (folder / SHAPES).write_text(json.dumps({name: array.shape for name, array in inputs.items()}), encoding="utf-8")


def _map_inputs(entry: Path) -> LoraInputs | None:
    try:
        flat = np.load(entry / INPUTS, mmap_mode="c", allow_pickle=False).view(np.ndarray)
        shapes = json.loads((entry / SHAPES).read_text(encoding="utf-8"))
        stops = np.cumsum([math.prod(shape) for shape in shapes.values()])
        parts = np.split(flat, stops[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    except (OSError, ValueError):  # another process just deleted it to make room
        return None


def _is_whole(entry: Path) -> bool:
    try:
        sizes = json.loads((entry / ENTRY).read_text(encoding="ascii"))
        return bool(sizes) and all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _measure(entry: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in entry.iterdir())
    return 0
