"""Live adapters at run time: their files, and the graph's inputs for requested mixes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from edgelora_runtime.bundle.choice import choose_variant
from edgelora_runtime.errors import IntegrityError
from edgelora_runtime.session.factors import PACKED, pack_mix, stack_mix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgelora_runtime.bundle.choice import LiveWeights
    from edgelora_runtime.bundle.folder import Bundle
    from edgelora_runtime.residency.packed_cache import PackedCache
    from edgelora_runtime.session.factors import AdapterTensors, LoraInputs

FILE_LIMIT = 1 << 32  # bytes of an adapter file


def read_adapter(raw: bytes, name: str) -> AdapterTensors:
    """Parses an adapter file.

    Raises IntegrityError unless it holds finite fp16 matrices lora_A and lora_B for each of its modules.
    """
    try:
        tensors = load(raw)
    except (SafetensorError, KeyError) as error:  # KeyError: of a type that numpy has not, such as BF16
        raise IntegrityError(f"{name} is not a readable safetensors file ({error})") from error
    wrong = sorted(key for key, tensor in tensors.items() if tensor.dtype != np.float16 or tensor.ndim != 2)
    if wrong:
        raise IntegrityError(f"{name} holds tensors that are not fp16 matrices: {', '.join(wrong[:4])}")
    if wrong := [key for key, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise IntegrityError(f"{name}: {', '.join(wrong[:4])} hold NaN or infinity; export the bundle again")
    modules = {key.removesuffix(".lora_A").removesuffix(".lora_B") for key in tensors}
    if single := sorted(m for m in modules if not {f"{m}.lora_A", f"{m}.lora_B"} <= tensors.keys()):
        raise IntegrityError(f"{name} lacks lora_A or lora_B of {', '.join(single[:4])}")
    return tensors


class LiveMixes:
    """The LoRA inputs of a bundle's live mixes. Those that were used last are kept.

    budget: bytes of adapter tensors and LoRA inputs to keep. The least recently used go first, and the last mix always stays.
    packed_cache: stores the inputs of live variants, which are then mapped and do not count toward the budget.
    """

    def __init__(self, bundle: Bundle, budget: int, packed_cache: PackedCache | None = None) -> None:
        self._bundle = bundle
        self._budget = budget
        self._packed_cache = packed_cache
        self._variants = {choose_variant(bundle.manifest, "cpu", name).live for name in bundle.manifest.variants}
        self._mapped: dict[LiveWeights, LoraInputs] = {}
        self._lock = threading.Lock()
        self._kept: OrderedDict[str | LiveWeights, Mapping[str, NDArray[Any]]] = (
            OrderedDict()
        )  # tensors by adapter, inputs by mix

    def get(self, mix: LiveWeights, lora_type: np.dtype[Any]) -> tuple[LoraInputs, int]:
        """Returns the inputs of a mix in that type, and the bytes made for them.

        The bytes are 0 if the inputs were kept, as the same mapping.
        """
        with self._lock:
            if mix in self._mapped:
                return self._mapped[mix], 0
            if mix in self._kept:
                self._kept.move_to_end(mix)
                return self._kept[mix], 0
            inputs = self._open(mix, lora_type)
            return inputs, _count_bytes(inputs)

    @property
    def bytes(self) -> int:
        """The bytes that are kept now."""
        with self._lock:
            return sum(map(_count_bytes, self._kept.values()))

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._mapped.clear()

    def _open(self, mix: LiveWeights, lora_type: np.dtype[Any]) -> LoraInputs:
        """Opens the inputs of a mix.

        Those of a live variant are mapped from the packed cache, after writing them there. Those of other mixes are made.
        """
        cache = self._packed_cache if mix in self._variants else None
        mapped = None if cache is None else cache.find_inputs(self._bundle, mix, lora_type)
        if mapped is None:
            slots, adapters = self._bundle.manifest.live_slots, [(self._read(name), weight) for name, weight in mix]
            made = pack_mix(slots, adapters) if lora_type == PACKED else stack_mix(slots, adapters, lora_type)
            mapped = None if cache is None else cache.write_inputs(self._bundle, mix, lora_type, made)
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

    def _read(self, name: str) -> AdapterTensors:
        if name not in self._kept:
            file = self._bundle.manifest.adapters[name].file
            assert file is not None  # parse_manifest() checked the references
            tensors = read_adapter(self._bundle.read(file, limit=FILE_LIMIT), file)
            known = {module for slots in self._bundle.manifest.live_slots for module in slots.modules}
            if unknown := sorted({key.rpartition(".")[0] for key in tensors} - known) or ([] if tensors else ["nothing"]):
                raise IntegrityError(
                    f"{file} changes {', '.join(unknown[:4])}, which live_slots do not list; export the bundle again"
                )
            self._kept[name] = tensors
        self._kept.move_to_end(name)
        return self._kept[name]


def _count_bytes(arrays: Mapping[str, NDArray[Any]]) -> int:
    return sum(array.nbytes for array in arrays.values())
