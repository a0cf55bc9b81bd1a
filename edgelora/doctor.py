"""Finds out what edgelora can use on this machine, and what to install."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from typing import TYPE_CHECKING

from edgelora.machine import count_cores, describe_machine, measure_bandwidth
from edgelora_runtime.residency.packed_cache import PackedCache, find_packed_folder
from edgelora_runtime.session.kernels import explain_absence, explain_choice, find_kernels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

RUNTIME = ("numpy", "onnxruntime", "tokenizers", "safetensors", "jinja2", "typer", "rich")
EXTRAS = {
    "export": ("torch", "transformers", "onnx", "onnx-ir", "ml-dtypes"),
    "train": ("peft", "trl", "bitsandbytes", "accelerate", "datasets", "pillow"),
    "serve": ("starlette", "uvicorn"),
}
_GPUS = {"CUDAExecutionProvider": "cuda", "WebGpuExecutionProvider": "webgpu"}
_WEBGPU_PLUGIN = "onnxruntime-ep-webgpu"

_EXAMPLE_WEIGHTS = 10**9
_BLOCK_BYTES = 20  # of 32 weights in a bundle: codes of 4 bits and a float32 scale

# Distributions that install the same files. onnxruntime-genai and the onnxruntime-ep-… plugins do not clash with them.
_ONNXRUNTIMES = {f"onnxruntime{suffix}" for suffix in ("", "-gpu", "-directml", "-webgpu", "-openvino", "-qnn", "-silicon")}


@dataclass(frozen=True)
class Readiness:
    """One thing that people do with edgelora.

    lacks: why it cannot be done here, "" if it can. remedy: the command that makes it ready, "" if there is none or none is due.
    """

    name: str
    lacks: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class DecodeLimit:
    """The speed at which memory lets a 4-bit model decode, since every token reads all weights once.

    bandwidth: bytes per second that `threads` threads together read. weights: of the model. weight_bytes: their size in a bundle.
    tokens_per_second: at most.
    """

    bandwidth: float
    threads: int
    weights: int
    weight_bytes: int
    tokens_per_second: float


@dataclass(frozen=True)
class Diagnosis:
    """The result of diagnose().

    python, system: versions. cpu: the processor's name. cores: logical cores. memory: bytes, None if unknown. providers:
    onnxruntime's execution providers. kernels: the instruction set of edgelora's own kernels, None if they are absent.
    kernels_choice: whose kernels serve 4-bit bundles, and why. decode_limit: what memory lets a model decode, None if there is no
    room to measure it. packages: version per package, None if it is not installed. packed_cache: the folder, and the bytes in it.
    ready: run, train, export, serve and gpu. remedy: the one command that makes ready what packages are missing for, "" if none
    is. advice: one line per thing to do, empty if all is well.
    """

    python: str
    system: str
    cpu: str
    cores: int
    memory: int | None
    providers: tuple[str, ...]
    kernels: str | None
    kernels_choice: str
    decode_limit: DecodeLimit | None
    packages: dict[str, str | None]
    packed_cache: tuple[Path, int]
    ready: tuple[Readiness, ...]
    remedy: str
    advice: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Checks the installed packages and onnxruntime, and measures memory. Imports nothing heavier than onnxruntime."""
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
    ready = (*_check_packages(packages), _check_gpu(providers))
    lacking = [item.name for item in ready if item.name in EXTRAS and item.remedy]
    advice += [f"edgelora {item.name} {item.lacks}: {item.remedy}" for item in ready if item.name in lacking]
    return Diagnosis(
        python=sys.version.split()[0],
        system=f"{platform.system()} {platform.machine()}",
        cpu=str(describe_machine()["cpu"]),
        cores=os.cpu_count() or 1,
        memory=_memory(),
        providers=providers,
        kernels=None if kernels is None else kernels.instruction_set,
        kernels_choice=explain_choice(),
        decode_limit=_measure_decode_limit(),
        packages=packages,
        packed_cache=_measure_packed_cache(),
        ready=ready,
        remedy=f"pip install 'edgelora[{','.join(lacking)}]'" if lacking else "",
        advice=tuple(advice),
    )


def _measure_decode_limit() -> DecodeLimit | None:
    """Measures the speed of memory, and finds what it lets the model of _EXAMPLE_WEIGHTS weights decode."""
    threads = count_cores()
    try:
        bandwidth = measure_bandwidth(threads)
    except MemoryError:
        return None
    size = _EXAMPLE_WEIGHTS // 32 * _BLOCK_BYTES
    return DecodeLimit(bandwidth, threads, _EXAMPLE_WEIGHTS, size, bandwidth / size)


def _check_packages(packages: Mapping[str, str | None]) -> Iterator[Readiness]:
    """Says of run, train, export and serve whether their packages are here. Training needs what export needs, too."""
    needs = {"run": RUNTIME, "train": (*EXTRAS["export"], *EXTRAS["train"]), "export": EXTRAS["export"], "serve": EXTRAS["serve"]}
    for name, names in needs.items():
        missing = [package for package in names if packages[package] is None]
        extra = f"[{name}]" if name in EXTRAS else ""
        yield Readiness(name, f"needs {', '.join(missing)}", f"pip install 'edgelora{extra}'") if missing else Readiness(name)


def _check_gpu(providers: Sequence[str]) -> Readiness:
    """Says whether onnxruntime finds a GPU that edgelora can use."""
    from edgelora_runtime.errors import UsageError
    from edgelora_runtime.session.providers import find_provider

    if not providers:
        return Readiness("gpu", "needs onnxruntime", "pip install edgelora")
    reasons = []
    for name in _GPUS.values():
        try:
            found = find_provider(name, architecture="llama", gpu_graphs=True)
        except UsageError as error:
            reasons.append(str(error))
        else:
            if found.device is not None or name == "cuda":
                return Readiness("gpu")
    if _version(_WEBGPU_PLUGIN) is None and "CUDAExecutionProvider" not in providers:
        return Readiness(
            "gpu",
            "no provider for a GPU is installed",
            f"pip install {_WEBGPU_PLUGIN}, or onnxruntime-gpu in place of onnxruntime",
        )
    return Readiness("gpu", reasons[-1] if reasons else "no GPU is found")


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
