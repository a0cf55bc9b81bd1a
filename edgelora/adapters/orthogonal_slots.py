"""Adapters made to be composed: A's that are frozen rows of one orthonormal basis, a different slot of it for each adapter."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


def basis_rows(module: str, columns: int, slot: int, rank: int) -> Floats:
    """Rows slot · rank to (slot + 1) · rank of a module's basis, float32 (rank, K): orthogonal to those of every other slot.

    The basis is a discrete cosine transform (DCT-II) after signs, in an order of frequencies, that the module's name draws: it
    is the same for everybody, and no row is computed that is not asked for. A row's norm is √(K / 3r), under which the mean
    of ‖Ax‖² is ‖x‖² / 3 as with Kaiming's initialization of one row.
    Training B alone on orthogonal random A's: arXiv 2402.16842, section 5; for adapters that are merged: arXiv 2504.07448.
    """
    if slot < 0 or (slot + 1) * rank > columns:
        raise InputError(f"composable slot {slot}: with rank {rank}, {module} has slots 0 to {columns // rank - 1}")
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "little"))
    signs = generator.choice([-1.0, 1.0], size=columns)
    frequencies = generator.permutation(columns)[slot * rank : (slot + 1) * rank]
    angles = np.pi * np.outer(frequencies, np.arange(columns) + 0.5) / columns
    norms = np.where(frequencies == 0, math.sqrt(1 / columns), math.sqrt(2 / columns)) * math.sqrt(columns / (3 * rank))
    rows: Floats = (norms[:, None] * np.cos(angles) * signs).astype(np.float32)
    return rows


def freeze_slot(model: Any, slot: int) -> None:
    """Sets the A's of PEFT's model to a slot of each module's basis, and has B alone learn."""
    import torch

    for name, module in model.named_modules():
        if "lora_A" not in getattr(module, "_modules", {}):
            continue
        for factor in module.lora_A.values():
            rank, columns = factor.weight.shape
            plain = name.removeprefix("base_model.model.")
            factor.weight.data = torch.from_numpy(basis_rows(plain, columns, slot, rank)).to(factor.weight.device)
            factor.weight.requires_grad_(requires_grad=False)
