"""Adapters made to be mixed: each A is frozen to its own slot.

A slot is a set of rows of a shared orthonormal basis.
"""

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
    """Computes a slot's rows of a module's basis, float32 (rank, K).

    These are rows slot · rank to (slot + 1) · rank, orthogonal to the rows of every other slot.

    The basis is a discrete cosine transform (DCT-II) with random signs and a random order of frequencies. The module's name seeds
    both, so everybody gets the same basis, and only the requested rows are computed. A row's norm is √(K / 3r), so that the mean
    of ‖Ax‖² is ‖x‖² / 3, as with Kaiming initialization of one row.
    Training only B on orthogonal random A's: arXiv 2402.16842, section 5. The same for merging: arXiv 2504.07448.
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
    """Freezes every A of a PEFT model to a slot of its module's basis.

    Only B is then trained.
    """
    import torch

    for name, module in model.named_modules():
        if "lora_A" not in getattr(module, "_modules", {}):
            continue
        for factor in module.lora_A.values():
            rank, columns = factor.weight.shape
            plain = name.removeprefix("base_model.model.")
            factor.weight.data = torch.from_numpy(basis_rows(plain, columns, slot, rank)).to(factor.weight.device)
            factor.weight.requires_grad_(requires_grad=False)
