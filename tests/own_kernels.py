"""What the tests of edgelora's own kernels share: sessions that have them, and the other instruction sets of the machine."""

from __future__ import annotations

import os
import subprocess
import sys

import onnxruntime as ort
import pytest

from edgelora_runtime.session.kernels import find_kernels

needs_kernels = pytest.mark.skipif(find_kernels() is None, reason="edgelora-kernels are not installed, or have none for this CPU")

_LESSER = {"avx512-vnni": ["avx2"]}


def open_own(model: bytes, *, threads: int = 1, own: bool = True) -> ort.InferenceSession:
    """A session with the kernels; own = False: one with onnxruntime's."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if own:
        found = find_kernels()
        assert found is not None
        options.register_custom_ops_library(str(found.library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_in_lesser_sets(code: str) -> None:
    """Runs code with each lesser instruction set, in a process of its own: which one runs is decided once."""
    found = find_kernels()
    assert found is not None
    for name in _LESSER.get(found.instruction_set, []):
        environment = os.environ | {"EDGELORA_INSTRUCTION_SET": name, "PYTHONPATH": os.pathsep.join(sys.path)}
        imports = "from edgelora_runtime.session.kernels import find_kernels"
        checked = f"{imports}\nassert find_kernels().instruction_set == {name!r}\n{code}"
        subprocess.run([sys.executable, "-c", checked], check=True, env=environment)
