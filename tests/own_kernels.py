"""Helpers for the tests of edgelora's kernels: sessions that use them, and runs with the machine's other instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys

import onnxruntime as ort
import pytest

from edgelora_runtime.session.kernels import find_kernels

_CHOICE = "EDGELORA_INSTRUCTION_SET"
_LESSER = ("avx-vnni", "avx2")


def find_lesser_sets() -> list[str]:
    """The supported instruction sets of this machine besides the one that the kernels use by default."""
    found = find_kernels()
    return [] if found is None else [name for name in _LESSER if name != found.instruction_set and _is_supported(name)]


def _is_supported(name: str) -> bool:
    import edgelora_kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_CHOICE, name)
        return edgelora_kernels.instruction_set() == name


needs_kernels = pytest.mark.skipif(find_kernels() is None, reason="edgelora-kernels are not installed or do not support this CPU")
needs_lesser_sets = pytest.mark.skipif(not find_lesser_sets(), reason="this CPU has no instruction set besides the tested one")


def open_own(model: bytes, *, threads: int = 1, own: bool = True) -> ort.InferenceSession:
    """A session with edgelora's kernels, or with onnxruntime's if own = False."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if own:
        found = find_kernels()
        assert found is not None
        options.register_custom_ops_library(str(found.library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_in_lesser_sets(code: str) -> None:
    """Runs code with each lesser instruction set, in a process of its own, since a process chooses its set once."""
    names = find_lesser_sets()
    assert names, "mark the test with needs_lesser_sets"
    for name in names:
        environment = os.environ | {_CHOICE: name, "PYTHONPATH": os.pathsep.join(sys.path)}
        imports = "from edgelora_runtime.session.kernels import find_kernels"
        checked = f"{imports}\nassert find_kernels().instruction_set == {name!r}\n{code}"
        subprocess.run([sys.executable, "-c", checked], check=True, env=environment)
