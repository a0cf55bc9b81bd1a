"""Where graphs run: onnxruntime's execution providers by the names that users give, looked for when one is asked for."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from edgelora_runtime.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

PROVIDERS = ("auto", "cpu", "cuda", "webgpu")
_CUDA, _WEBGPU = "CUDAExecutionProvider", "WebGpuExecutionProvider"
# WebGPU's GroupQueryAttention leaves out the soft cap of its scores, in silence (docs/log.md).
_CAPPED = frozenset({"gemma2"})


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    name: one of PROVIDERS. target: the graphs that are built for it. implementation: onnxruntime's name of it. memory: the
    device that a KV cache lies on, by onnxruntime's name. device: the OrtEpDevice to give a session, None to go by name.
    """

    name: str
    target: str
    implementation: str
    memory: str
    device: Any = None


CPU = Provider("cpu", "cpu", "CPUExecutionProvider", "cpu")


def find_provider(name: str, *, architecture: str, gpu_graphs: bool) -> Provider:
    """The provider of that name; UsageError says what to install where it is not there.

    architecture: the manifest's; not every provider computes every one. gpu_graphs: whether there are graphs for a GPU; "auto"
    is then the first provider that sees a GPU, else the CPU.
    """
    if name not in PROVIDERS:
        raise UsageError(f"provider {name!r} is not supported; use one of {', '.join(PROVIDERS)}")
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


def open_session(graph: Path, options: ort.SessionOptions, provider: Provider) -> ort.InferenceSession:
    """A session over a graph. Raises IntegrityError where the CPU cannot open it, UsageError where another provider cannot."""
    try:
        if provider.device is not None:
            options.add_provider_for_devices([provider.device], {})
            session = ort.InferenceSession(graph, options)
        else:
            names = dict.fromkeys((provider.implementation, CPU.implementation))
            session = ort.InferenceSession(graph, options, providers=list(names), enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise refusal(provider, f"open {graph.name}", error) from error
    if provider.implementation not in session.get_providers():  # CUDA without its libraries goes in silence
        raise UsageError(f"provider {provider.name!r} does not start here; see onnxruntime's messages, or use 'cpu'")
    return session


def refusal(provider: Provider, task: str, error: Exception) -> IntegrityError | UsageError:
    """What to raise where onnxruntime cannot do something: on the CPU the graph is to blame, elsewhere the choice may be."""
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
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it cannot find
        ort.preload_dlls()  # CUDA's libraries, where they came as packages
    if (reason := _why_no_memory("cuda")) is not None:
        raise UsageError(f"provider 'cuda' finds no GPU that it can use ({reason}); check nvidia-smi, or use 'cpu'")
    return Provider("cuda", "gpu", _CUDA, "cuda")


def _find_webgpu(architecture: str) -> Provider:
    if architecture in _CAPPED:
        raise UsageError(f"provider 'webgpu' leaves out the soft cap of {architecture}'s attention; use 'cuda' or 'cpu'")
    installed = _register_webgpu()
    device = next((device for device in ort.get_ep_devices() if device.ep_name == _WEBGPU), None)
    # A package with WebGPU built in need not list the device that it uses: software Vulkan is none.
    if device is None and _WEBGPU not in ort.get_available_providers():
        raise UsageError(
            "provider 'webgpu' (onnxruntime-ep-webgpu) sees no GPU on this system; use 'cpu'"
            if installed
            else "provider 'webgpu' is not installed; run: pip install onnxruntime-ep-webgpu"
        )
    memory = "cpu" if _why_no_memory("webgpu") else "webgpu"
    return Provider("webgpu", "gpu", _WEBGPU, memory, device)


@cache
def _register_webgpu() -> bool:
    """Tells onnxruntime of the WebGPU plugin, once per process; False where it is not installed."""
    try:
        import onnxruntime_ep_webgpu
    except ImportError:
        return False
    if all(device.ep_name != _WEBGPU for device in ort.get_ep_devices()):  # else the app did
        ort.register_execution_provider_library("edgelora.webgpu", onnxruntime_ep_webgpu.get_library_path())
    return True


def _why_no_memory(device: str) -> str | None:
    """Why nothing can be stored on a device; None where something can."""
    try:
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), device, 0)
    except Exception as error:  # as above
        return str(error).splitlines()[0][:200]
    return None
