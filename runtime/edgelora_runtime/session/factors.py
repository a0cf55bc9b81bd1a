"""The LoRA factors of a weighted mix as graph inputs.

They are floats for each product, or packed for edgelora's kernels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgelora_runtime.bundle.manifest import LiveSlots

    Floats = NDArray[np.float32]
    Float16s = NDArray[np.float16]
    AdapterTensors = Mapping[str, Float16s]  # {module}.lora_A (r, K) and {module}.lora_B (N, r)
    WeightedFactors = tuple[Float16s, Float16s, float]  # A (r, K), B (N, r) and the weight of one adapter in one module
    LoraInputs = Mapping[str, NDArray[Any]]  # by input name: float32, float16 for a GPU's graphs, or uint8 (PACKED)

FACTORS = "factors"  # the input for packed factors
PACKED = np.dtype(np.uint8)
MAX_PARTS = 3  # modules of a product that can be packed
_GROUP = 16  # rows of B that are stored together; rows of A are padded to a multiple of it
_SLOT = 2 + MAX_PARTS  # int64 values of a slot's entry: offset, rank, and the rows of each part
_ALIGNMENT = 64


def stack_mix(slots: Sequence[LiveSlots], mix: Sequence[tuple[AdapterTensors, float]], float_type: np.dtype[Any]) -> LoraInputs:
    """Returns the inputs that compute Σ w·B·A exactly.

    Ranks add up, and each weight is multiplied into its adapter's B. Each product has A (parts * R, K), and each part B (R, N),
    in the float type. Parts of unequal rank are padded with zeros, since one A serves them all. An empty mix gives rank 0, which
    is the bare base.
    """
    inputs: dict[str, Floats] = {}
    for slot in slots:
        parts, rank = _collect(slot, mix)
        inputs[slot.a] = a = np.zeros((len(parts), rank, slot.columns), np.float32)
        for index, (factors, name, rows) in enumerate(zip(parts, slot.b, slot.rows, strict=True)):
            inputs[name] = b = np.zeros((rank, rows), np.float32)
            start = 0
            for down, up, weight in factors:
                stop = start + len(down)
                a[index, start:stop] = down
                b[start:stop] = up.T
                with np.errstate(over="ignore"):
                    b[start:stop] *= np.float32(weight)
                start = stop
        inputs[slot.a] = a.reshape(-1, slot.columns)
    with np.errstate(over="ignore"):  # the error below names the input
        typed = {name: array.astype(float_type, copy=False) for name, array in inputs.items()}
    if wrong := [name for name, array in typed.items() if not np.isfinite(array).all()]:
        raise UsageError(f"the weights of this mix make {wrong[0]} larger than {float_type} holds; use smaller ones")
    return typed


def pack_mix(slots: Sequence[LiveSlots], mix: Sequence[tuple[AdapterTensors, float]]) -> LoraInputs:
    """Packs a mix, as in stack_mix(), into one input of bytes.

    Factors stay fp16 and unchanged, with weights apart (docs/reference/bundle-format.md).
    """
    collected = [_collect(slot, mix) for slot in slots]
    table = np.zeros((len(slots), _SLOT), np.int64)
    size = 8 + table.nbytes
    for entry, slot, (_, rank) in zip(table, slots, collected, strict=True):
        if len(slot.rows) > MAX_PARTS:
            raise IntegrityError(f"live_slots of {slot.a} have {len(slot.rows)} modules; kernels take at most {MAX_PARTS}")
        offset = -(-size // _ALIGNMENT) * _ALIGNMENT
        entry[:2], entry[2 : 2 + len(slot.rows)] = (offset, rank), slot.rows
        size = offset + sum(kind.itemsize * math.prod(shape) for kind, shape in _lay_out(slot, rank))
    packed = np.zeros(size, PACKED)
    packed[: 8 + table.nbytes].view(np.int64)[:] = [len(slots), *table.reshape(-1)]
    for entry, slot, (parts, rank) in zip(table, slots, collected, strict=True):
        _fill(packed[entry[0] :], _lay_out(slot, rank), parts)
    return {FACTORS: packed}


def _lay_out(slot: LiveSlots, rank: int) -> list[tuple[np.dtype[Any], tuple[int, ...]]]:
    """Returns the arrays of a slot in their order: the weights, A, and a B for each part."""
    parts, half = len(slot.modules), np.dtype(np.float16)
    weights = (np.dtype(np.float32), (parts, rank))
    a = (half, (parts, rank, _GROUP * _count_groups(slot.columns)))
    return [weights, a, *((half, (_count_groups(rows), rank, _GROUP)) for rows in slot.rows)]


def _fill(
    block: NDArray[np.uint8], layout: list[tuple[np.dtype[Any], tuple[int, ...]]], parts: list[list[WeightedFactors]]
) -> None:
    """Writes a product's factors into a block of zeros."""
    stops = np.cumsum([kind.itemsize * math.prod(shape) for kind, shape in layout])
    arrays = np.split(block[: stops[-1]], stops[:-1])
    weights, a, *ups = (array.view(kind).reshape(shape) for array, (kind, shape) in zip(arrays, layout, strict=True))
    for index, (factors, b) in enumerate(zip(parts, ups, strict=True)):
        start = 0
        for down, up, weight in factors:
            stop = start + len(down)
            weights[index, start:stop] = weight  # finite as float32: choice.py and the manifest hold it to that
            a[index, start:stop, : down.shape[1]] = down
            rows, whole = b.transpose(0, 2, 1)[..., start:stop], len(up) // _GROUP
            rows[:whole] = up[: whole * _GROUP].reshape(whole, _GROUP, len(down))
            rows[whole:, : len(up) % _GROUP] = up[whole * _GROUP :]
            start = stop


def _collect(slot: LiveSlots, mix: Sequence[tuple[AdapterTensors, float]]) -> tuple[list[list[WeightedFactors]], int]:
    """Returns the adapters' factors for a product, part by part, and the padded parts' rank."""
    parts = [
        [(tensors[f"{m}.lora_A"], tensors[f"{m}.lora_B"], weight) for tensors, weight in mix if f"{m}.lora_A" in tensors]
        for m in slot.modules
    ]
    for module, rows, factors in zip(slot.modules, slot.rows, parts, strict=True):
        for a, b, _ in factors:
            if a.shape != (len(a), slot.columns) or b.shape != (rows, len(a)):
                raise IntegrityError(f"an adapter's factors for {module} have shapes {a.shape} and {b.shape}")
    return parts, max(sum(len(a) for a, _, _ in factors) for factors in parts)


def _count_groups(size: int) -> int:
    return -(-size // _GROUP)
