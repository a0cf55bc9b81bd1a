"""The factors of a weighted mix of live adapters as a graph's inputs: in floats, product by product, or packed for kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgelora_runtime.manifest import LiveSlots

    Floats = NDArray[np.float32]
    Halves = NDArray[np.float16]
    Factors = Mapping[str, Halves]  # of an adapter, by tensor
    Parts = list[list[tuple[Halves, Halves, float]]]  # of a product, and of its parts: A (r, K), B (N, r) and weight by adapter
    LoraInputs = Mapping[str, NDArray[Any]]  # float32, float16 for a GPU's graphs, or uint8: see PACKED

FACTORS = "factors"  # the input that takes what pack_mix makes
PACKED = np.dtype(np.uint8)
MOST_PARTS = 3  # that a product may have to be packed
_GROUP = 16  # columns of B that lie together; rows of A are filled up to a multiple
_SLOT = 2 + MOST_PARTS  # int64 of a slot's entry: offset, rank, and each part's rows
_ALIGNMENT = 64


def stack_mix(slots: Sequence[LiveSlots], mix: Sequence[tuple[Factors, float]], float_type: np.dtype[Any]) -> LoraInputs:
    """The inputs for Σ w·B·A, exactly: ranks add up, and each weight goes into its adapter's B.

    Returns for each product A (parts * R, K), and per part B (R, N), of the float type. Parts of unequal rank are filled
    up with zeros, since one A serves them all. An empty mix gives rank 0, which is the bare base.
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
                b[start:stop] *= np.float32(weight)
                start = stop
        inputs[slot.a] = a.reshape(-1, slot.columns)
    return {name: array.astype(float_type, copy=False) for name, array in inputs.items()}


def pack_mix(slots: Sequence[LiveSlots], mix: Sequence[tuple[Factors, float]]) -> LoraInputs:
    """The same as one input of bytes, laid out as docs/bundle-format.md has it: fp16 factors as they are, weights beside."""
    table = np.zeros((len(slots), _SLOT), np.int64)
    blocks = [_pack_slot(slot, *_collect(slot, mix), entry) for slot, entry in zip(slots, table, strict=True)]
    start = _align(8 + table.nbytes)
    for block, entry in zip(blocks, table, strict=True):
        entry[0] = start
        start = _align(start + len(block))
    packed = np.zeros(start, PACKED)
    packed[:8] = np.frombuffer(np.int64(len(slots)).tobytes(), PACKED)
    packed[8 : 8 + table.nbytes] = table.reshape(-1).view(PACKED)
    for block, entry in zip(blocks, table, strict=True):
        packed[entry[0] : entry[0] + len(block)] = block
    return {FACTORS: packed}


def _pack_slot(slot: LiveSlots, parts: Parts, rank: int, entry: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The weights of a product's ranks, its A and its B's; the rank and the rows go into its entry."""
    entry[1], entry[2 : 2 + len(parts)] = rank, slot.rows
    weights = np.zeros((len(parts), rank), np.float32)
    a = np.zeros((len(parts), rank, _GROUP * _count_groups(slot.columns)), np.float16)
    ups = [np.zeros((_GROUP * _count_groups(rows), rank), np.float16) for rows in slot.rows]
    for index, (factors, b) in enumerate(zip(parts, ups, strict=True)):
        start = 0
        for down, up, weight in factors:
            stop = start + len(down)
            weights[index, start:stop] = weight
            a[index, start:stop, : slot.columns] = down
            b[: len(up), start:stop] = up
            start = stop
    groups = [b.reshape(len(b) // _GROUP, _GROUP, rank).transpose(0, 2, 1) for b in ups]
    return np.concatenate([np.ascontiguousarray(array).reshape(-1).view(PACKED) for array in (weights, a, *groups)])


def _collect(slot: LiveSlots, mix: Sequence[tuple[Factors, float]]) -> tuple[Parts, int]:
    """What adapters have for a product, part by part, and the rank that all parts get."""
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


def _align(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
