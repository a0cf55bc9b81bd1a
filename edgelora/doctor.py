"""Finds out what edgelora can use on this machine, and what to install."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from typing import TYPE_CHECKING

from edgelora_runtime.residency.packed_cache import PackedCache, find_packed_folder
from edgelora_runtime.session.kernels import explain_absence, find_kernels

if TYPE_CHECKING:
    from pathlib import Path

RUNTIME = ("numpy", "onnxruntime", "tokenizers", "safetensors", "jinja2", "typer", "rich")
EXTRAS = {
    "export": ("torch", "transformers", "onnx", "onnx-ir", "ml-dtypes"),
    "train": ("peft", "trl", "bitsandbytes", "accelerate", "datasets"),
}

# Distributions that install the same files. onnxruntime-genai and the onnxruntime-ep-… plugins do not clash with them.
_ONNXRUNTIMES = {f"onnxruntime{suffix}" for suffix in ("", "-gpu", "-directml", "-webgpu", "-openvino", "-qnn", "-silicon")}


@dataclass(frozen=True)
class Diagnosis:
    """The result of diagnose().

    python, system: versions. cores: logical cores. memory: bytes, None if unknown. providers: onnxruntime's execution providers.
    kernels: the instruction set of edgelora's own kernels, None if they are absent. packages: version per package, None if it is
    not installed. packed_cache: the folder, and the bytes in it. advice: one line per thing to do, empty if all is well.
    """

    python: str
    system: str
    cores: int
    memory: int | None
    providers: tuple[str, ...]
    kernels: str | None
    packages: dict[str, str | None]
    packed_cache: tuple[Path, int]
    advice: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Checks the installed packages and onnxruntime. Imports nothing heavier than onnxruntime."""
    packages = {name: _version(name) for name in (*RUNTIME, *(name for names in EXTRAS.values() for name in names))}
    providers: tuple[str, ...] = ()
    advice = []
    if packages["onnxruntime"] is not None:
        import onnxruntime

        providers = tuple(onnxruntime.get_available_providers())
    flavours = sorted({item.name for item in distributions()} & _ONNXRUNTIMES)
    if len(flavours) > 1:
        advice.append(
            f"{' and '.join(flavours)} share their files and overwrite each other; uninstall them all, then install one"
        )
    kernels = find_kernels()
    if kernels is None:
        advice.append(f"edgelora's own kernels {explain_absence()}; onnxruntime's kernels are used instead, which are slower")
    for extra, names in EXTRAS.items():
        if missing := [name for name in names if packages[name] is None]:
            advice.append(f"edgelora {extra} needs {', '.join(missing)}: pip install 'edgelora[{extra}]'")
    return Diagnosis(
        python=sys.version.split()[0],
        system=f"{platform.system()} {platform.machine()}",
        cores=os.cpu_count() or 1,
        memory=_memory(),
        providers=providers,
        kernels=None if kernels is None else kernels.instruction_set,
        packages=packages,
        packed_cache=_measure_packed_cache(),
        advice=tuple(advice),
    )


def _measure_packed_cache() -> tuple[Path, int]:
    folder = find_packed_folder()
    return folder, PackedCache(folder).measure() if folder.is_dir() else 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
