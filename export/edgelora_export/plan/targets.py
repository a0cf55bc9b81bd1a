"""What graphs are built for: the CPU in float32, or any GPU in fp16; both over the same codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Target:
    """One way to build a graph.

    name: in file names and the manifest. float_type: of activations, scales and the KV cache; logits are always float32.
    accuracy_level: MatMulNBits' own. fused_matmul: whether FusedMatMul has a kernel there; it multiplies with a float matrix as
    it is stored, where MatMul needs it transposed: a weight at load, a live adapter's A in every step.
    """

    name: str
    float_type: ir.DataType
    accuracy_level: int
    fused_matmul: bool


# Level 4 rounds activations to int8, the only fast path of the CPU. The GPUs' kernels are fast without, and default to none.
CPU = Target("cpu", ir.DataType.FLOAT, accuracy_level=4, fused_matmul=True)
GPU = Target("gpu", ir.DataType.FLOAT16, accuracy_level=0, fused_matmul=False)
TARGETS = {target.name: target for target in (CPU, GPU)}


def check_targets(names: Sequence[str]) -> None:
    """Refuses names that are no targets or stand twice, and a bundle that no CPU could run."""
    known = tuple(TARGETS)
    if CPU.name not in names or any(name not in known or names.count(name) > 1 for name in names):
        raise InputError(f"targets = {list(names)}: use {' and '.join(TARGETS)}, each once; every bundle has {CPU.name}")
