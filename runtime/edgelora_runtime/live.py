"""Live adapters at run time: the factors of a weighted mix, stacked along the rank, as the graph's LoRA inputs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from edgelora_runtime.choice import choose_variant
from edgelora_runtime.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgelora_runtime.bundle import Bundle
    from edgelora_runtime.manifest import LiveSlots
    from edgelora_runtime.packed_cache import PackedCache

    Floats = NDArray[np.float32]
    Factors = Mapping[str, NDArray[np.float16]]
    Weights = tuple[tuple[str, float], ...]  # by adapter, sorted
    LoraInputs = Mapping[str, NDArray[np.floating[Any]]]  # float32, or float16 for a GPU's graphs

FILE_LIMIT = 1 << 32  # bytes of one adapter file
_FLOAT32 = np.dtype(np.float32)


def read_factors(raw: bytes, name: str) -> Factors:
    """The fp16 tensors of an adapter file."""
    try:
        factors = load(raw)
    except SafetensorError as error:
        raise IntegrityError(f"{name} is not a readable safetensors file ({error})") from error
    wrong = sorted(key for key, tensor in factors.items() if tensor.dtype != np.float16 or tensor.ndim != 2)
    if wrong:
        raise IntegrityError(f"{name} holds tensors that are not fp16 matrices: {', '.join(wrong[:4])}")
    modules = {key.removesuffix(".lora_A").removesuffix(".lora_B") for key in factors}
    if single := sorted(m for m in modules if not {f"{m}.lora_A", f"{m}.lora_B"} <= factors.keys()):
        raise IntegrityError(f"{name} lacks lora_A or lora_B of {', '.join(single[:4])}")
    return factors


def stack_mix(
    slots: Sequence[LiveSlots], mix: Sequence[tuple[Factors, float]], float_type: np.dtype[Any] = _FLOAT32
) -> LoraInputs:
    """The LoRA inputs for Σ w·B·A, exactly: ranks add up, and each weight goes into its adapter's B.

    Returns for each product A (parts * R, K), and per part B (R, N), of the float type. Parts of unequal rank are filled
    up with zeros, since one A serves them all. An empty mix gives rank 0, which is the bare base.
    """
    inputs: dict[str, Floats] = {}
    for slot in slots:
        parts = [
            [(tensors[f"{m}.lora_A"], tensors[f"{m}.lora_B"], weight) for tensors, weight in mix if f"{m}.lora_A" in tensors]
            for m in slot.modules
        ]
        for module, rows, factors in zip(slot.modules, slot.rows, parts, strict=True):
            for a, b, _ in factors:
                if a.shape != (len(a), slot.columns) or b.shape != (rows, len(a)):
                    raise IntegrityError(f"an adapter's factors for {module} have shapes {a.shape} and {b.shape}")
        rank = max(sum(len(a) for a, _, _ in factors) for factors in parts)
        stacked_a = np.zeros((len(parts) * rank, slot.columns), np.float32)
        for index, (factors, name, rows) in enumerate(zip(parts, slot.b, slot.rows, strict=True)):
            stacked_b = np.zeros((rank, rows), np.float32)
            start = 0
            for a, b, weight in factors:
                stop = start + len(a)
                stacked_a[index * rank + start : index * rank + stop] = a
                stacked_b[start:stop] = b.T
                stacked_b[start:stop] *= np.float32(weight)
                start = stop
            inputs[name] = stacked_b
        inputs[slot.a] = stacked_a
    return {name: array.astype(float_type, copy=False) for name, array in inputs.items()}


class LiveMixes:
    """The LoRA inputs of a bundle's live mixes, each made once while it is among the last that were asked for.

    budget: bytes of factors and LoRA inputs kept for the way back, least recently used out first; the last mix always stays.
    packed_cache: keeps the inputs of live variants, which then are mapped and take nothing of the budget.
    """

    def __init__(self, bundle: Bundle, budget: int, packed_cache: PackedCache | None = None) -> None:
        self._bundle = bundle
        self._budget = budget
        self._packed_cache = packed_cache
        self._variants = {choose_variant(bundle.manifest, "cpu", name).live for name in bundle.manifest.variants}
        self._mapped: dict[Weights, LoraInputs] = {}
        self._lock = threading.Lock()
        self._kept: OrderedDict[str | Weights, Mapping[str, NDArray[Any]]] = OrderedDict()  # factors by adapter, inputs by mix

    def get(self, mix: Weights, float_type: np.dtype[Any]) -> tuple[LoraInputs, int]:
        """The inputs for a mix, the same mapping while it is kept, and the bytes that had to be made for it."""
        with self._lock:
            if mix in self._mapped:
                return self._mapped[mix], 0
            if mix in self._kept:
                self._kept.move_to_end(mix)
                return self._kept[mix], 0
            inputs = self._open(mix, float_type)
            return inputs, _count_bytes(inputs)

    @property
    def bytes(self) -> int:
        """What is kept now."""
        with self._lock:
            return sum(map(_count_bytes, self._kept.values()))

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._mapped.clear()

    def _open(self, mix: Weights, float_type: np.dtype[Any]) -> LoraInputs:
        """Maps the inputs of a live variant, written where they are not yet; makes those of any other mix."""
        cache = self._packed_cache if mix in self._variants and float_type == _FLOAT32 else None
        mapped = None if cache is None else cache.find_inputs(self._bundle, mix)
        if mapped is None:
            factors = [(self._read(name), weight) for name, weight in mix]
            made = stack_mix(self._bundle.manifest.live_slots, factors, float_type)
            mapped = None if cache is None else cache.write_inputs(self._bundle, mix, made)
            if mapped is None:
                self._kept[mix] = made
            self._make_room()
        if mapped is None:
            return made
        self._mapped[mix] = mapped
        return mapped

    def _make_room(self) -> None:
        while len(self._kept) > 1 and sum(map(_count_bytes, self._kept.values())) > self._budget:
            self._kept.popitem(last=False)

    def _read(self, name: str) -> Factors:
        if name not in self._kept:
            file = self._bundle.manifest.adapters[name].file
            assert file is not None  # the manifest's references were checked
            self._kept[name] = read_factors(self._bundle.read(file, limit=FILE_LIMIT), file)
        self._kept.move_to_end(name)
        return self._kept[name]


def _count_bytes(arrays: Mapping[str, NDArray[Any]]) -> int:
    return sum(array.nbytes for array in arrays.values())
