"""The targets of graphs: the CPU in float32, or any GPU in fp16. Both share the same codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Target:
    """One target of graphs.

    name: in file names and the manifest. float_type: of activations, scales and the KV cache. Logits are always float32.
    accuracy_level: the attribute of MatMulNBits. fused_matmul: True if FusedMatMul has a kernel for the target. FusedMatMul
    multiplies by a float matrix as stored. MatMul needs it transposed: a weight once at load, a live adapter's A in every step.
    """

    name: str
    float_type: ir.DataType
    accuracy_level: int
    fused_matmul: bool


# Level 4 rounds activations to int8, which is the only fast path on CPUs. GPU kernels are fast without it and default to 0.
CPU = Target("cpu", ir.DataType.FLOAT, accuracy_level=4, fused_matmul=True)
GPU = Target("gpu", ir.DataType.FLOAT16, accuracy_level=0, fused_matmul=False)
TARGETS = {target.name: target for target in (CPU, GPU)}


def check_targets(names: Sequence[str]) -> None:
    """Raises InputError for unknown or repeated names, and for a bundle that no CPU could run."""
    known = tuple(TARGETS)
    if CPU.name not in names or any(name not in known or names.count(name) > 1 for name in names):
        raise InputError(f"targets = {list(names)}: use {' and '.join(TARGETS)}, each once; every bundle has {CPU.name}")
