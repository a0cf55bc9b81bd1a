"""Live adapters: the graph inputs for each module's A and B, and the fp16 file that holds an adapter's factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors.numpy import save

from edgelora_export.weights.fp16_copies import to_fp16
from edgelora_runtime.bundle.manifest import LiveSlots

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgelora_export.decoder.description import Decoder, Linear
    from edgelora_export.plan.variants import LowRank


def name_live_slots(linear: Linear) -> LiveSlots:
    """Names a product's LoRA inputs, and the modules whose factors they take."""
    return LiveSlots(
        a=f"{linear.name}.lora_A",
        b=tuple(f"{module}.lora_B" for module in linear.modules),
        modules=linear.modules,
        columns=linear.columns,
        rows=tuple(part.graph_rows for part in linear.parts),
    )


def pack_live_adapter(decoder: Decoder, adapter: LowRank) -> bytes:
    """Packs an adapter as safetensors: fp16 lora_A (r, K) and lora_B (N, r) for each module, with the scaling folded into B."""
    tensors: dict[str, NDArray[np.float16]] = {}
    for linear in decoder.linears:
        for part in linear.parts:
            if part.module in adapter.modules:
                a, b = adapter.factors(part.module)
                owner = f"the adapter's factor for {part.module}"
                tensors[f"{part.module}.lora_A"] = to_fp16(part.pad_columns(a), owner, "export it merged")
                tensors[f"{part.module}.lora_B"] = to_fp16(part.pad_rows(b), owner, "export it merged")
    return save(tensors)
