"""Execution providers of onnxruntime, by the names that users give them.

They are looked up on first use.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from edgelora_runtime.arguments import show
from edgelora_runtime.errors import IntegrityError, UsageError, suggest_name
from edgelora_runtime.session.process import count_native_call, keep_in_child

if TYPE_CHECKING:
    from pathlib import Path

PROVIDERS = ("auto", "cpu", "cuda", "webgpu")
_CUDA, _WEBGPU = "CUDAExecutionProvider", "WebGpuExecutionProvider"
# WebGPU's GroupQueryAttention silently ignores the soft cap of its scores (docs/log.md).
_CAPPED = frozenset({"gemma2"})


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    name: one of PROVIDERS. target: the graphs that are built for it. implementation: onnxruntime's name for it. memory: the
    device of a KV cache, by onnxruntime's name. device: the OrtEpDevice to pass to a session, or None to choose by name.
    """

    name: str
    target: str
    implementation: str
    memory: str
    device: Any = None


CPU = Provider("cpu", "cpu", "CPUExecutionProvider", "cpu")


def find_provider(name: str, *, architecture: str, gpu_graphs: bool) -> Provider:
    """Finds the provider of that name.

    If it is missing, UsageError says what to install. architecture: the manifest's, since not every provider computes every
    architecture correctly. gpu_graphs: whether the bundle has graphs for a GPU. If so, "auto" is the first provider that finds a
    GPU, otherwise the CPU.
    """
    if not isinstance(name, str) or name not in PROVIDERS:
        near = suggest_name([name], PROVIDERS)
        raise UsageError(f"provider {show(name)} is not supported; use one of {', '.join(PROVIDERS)}{near}")
    if name == "cuda":
        return _find_cuda()
    if name == "webgpu":
        return _find_webgpu(architecture)
    if name == "auto" and gpu_graphs:
        with contextlib.suppress(UsageError):
            return _find_cuda()
        with contextlib.suppress(UsageError):
            webgpu = _find_webgpu(architecture)
            if webgpu.device is not None:
                return webgpu
    return CPU


def choose_target(target: str | None, provider: Provider, *, gpu_graphs: bool) -> str:
    """Chooses the graphs to run, "cpu" or "gpu". None takes those that are built for the provider.

    Raises UsageError for another target, and for "gpu" if the bundle has no such graphs.
    """
    chosen = provider.target if target is None else target
    if not isinstance(chosen, str) or chosen not in ("cpu", "gpu"):
        raise UsageError(f"target {show(chosen)} is not supported; use cpu or gpu")
    if chosen == "gpu" and not gpu_graphs:
        raise UsageError('this bundle has no gpu graphs; export it with targets = ["cpu", "gpu"], or use provider \'cpu\'')
    return chosen


def open_session(graph: Path, options: ort.SessionOptions, provider: Provider) -> ort.InferenceSession:
    """Opens a session.

    Raises IntegrityError if the CPU cannot open the graph, UsageError if another provider cannot.
    """
    try:
        with count_native_call():
            if provider.device is not None:
                options.add_provider_for_devices([provider.device], {})
                session = ort.InferenceSession(graph, options)
            else:
                names = dict.fromkeys((provider.implementation, CPU.implementation))
                session = ort.InferenceSession(graph, options, providers=list(names), enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise explain_failure(provider, f"open {graph.name}", error) from error
    if provider.implementation not in session.get_providers():  # without its libraries, CUDA is dropped silently
        raise UsageError(f"provider {provider.name!r} does not start here; see onnxruntime's messages, or use 'cpu'")
    return keep_in_child(session)


def explain_failure(provider: Provider, task: str, error: Exception) -> IntegrityError | UsageError:
    """Returns the error for a failure of onnxruntime.

    On the CPU the graph is at fault. Elsewhere the choice of provider may be.
    """
    reason = str(error).splitlines()[0][:300]
    if provider is CPU:
        return IntegrityError(f"onnxruntime cannot {task}: {reason}")
    return UsageError(f"provider {provider.name!r} cannot {task}: {reason}; use 'cpu'")


def _find_cuda() -> Provider:
    if _CUDA not in ort.get_available_providers():
        raise UsageError(
            "provider 'cuda' is not in this onnxruntime; put onnxruntime-gpu in its place: "
            "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    with contextlib.redirect_stdout(sys.stderr):  # it prints which libraries are missing
        ort.preload_dlls()  # loads CUDA's libraries from installed packages
    if (reason := _explain_no_memory("cuda")) is not None:
        raise UsageError(f"provider 'cuda' finds no GPU that it can use ({reason}); check nvidia-smi, or use 'cpu'")
    return Provider("cuda", "gpu", _CUDA, "cuda")


def _find_webgpu(architecture: str) -> Provider:
    if architecture in _CAPPED:
        raise UsageError(f"provider 'webgpu' leaves out the soft cap of {architecture}'s attention; use 'cuda' or 'cpu'")
    installed = _register_webgpu()
    device = next((device for device in ort.get_ep_devices() if device.ep_name == _WEBGPU), None)
    # A package with WebGPU built in may use a device that it does not list, such as software Vulkan.
    if device is None and _WEBGPU not in ort.get_available_providers():
        raise UsageError(
            "provider 'webgpu' (onnxruntime-ep-webgpu) sees no GPU on this system; use 'cpu'"
            if installed
            else "provider 'webgpu' is not installed; run: pip install onnxruntime-ep-webgpu"
        )
    memory = "cpu" if _explain_no_memory("webgpu") else "webgpu"
    return Provider("webgpu", "gpu", _WEBGPU, memory, device)


@cache
def _register_webgpu() -> bool:
    """Registers the WebGPU plugin with onnxruntime, once per process.

    Returns False if it is not installed.
    """
    try:
        import onnxruntime_ep_webgpu
    except ImportError:
        return False
    if all(device.ep_name != _WEBGPU for device in ort.get_ep_devices()):  # otherwise the app has registered it
        ort.register_execution_provider_library("edgelora.webgpu", onnxruntime_ep_webgpu.get_library_path())
    return True


def _explain_no_memory(device: str) -> str | None:
    """Returns the reason a device cannot hold tensors, or None if it can."""
    try:
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), device, 0)
    except Exception as error:  # as in open_session
        return str(error).splitlines()[0][:200]
    return None
