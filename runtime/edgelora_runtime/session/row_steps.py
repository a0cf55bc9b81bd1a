"""Steps that read one token of several texts each, whose keys and values lie beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.session.binding import Binding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnxruntime as ort
    from numpy.typing import NDArray

    from edgelora_runtime.bundle.manifest import ModelEntry

    Floats = NDArray[np.float32]

KEEP = "logits_to_keep"  # input: the number of last positions that get logits


class RowSteps:
    """A graph's steps over the newest token of several texts. Each binds only what changed since the last one."""

    def __init__(self, sessions: Sequence[ort.InferenceSession], entry: ModelEntry) -> None:
        self._binding = Binding(sessions)
        self._vocab_size = entry.vocab_size
        self._live: Mapping[str, NDArray[Any]] = {}
        self._held: tuple[int, Mapping[str, NDArray[Any]]] | None = None
        self._keep = np.ones(1, np.int64)
        self._binding.optional_input(KEEP, self._keep)

    def run(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        buffers: Mapping[str, NDArray[Any]],
        live: Mapping[str, NDArray[Any]],
    ) -> Floats:
        """Reads a token of each text and returns the logits after them, float32 (B, V), which nothing overwrites.

        tokens, lengths: one for each text; its length is the number of positions before the token. buffers: by {layer}.key and
        {layer}.value, float32 (slots, kv_heads, capacity, head_size), whose first B slots belong to the texts. live: the LoRA
        inputs.
        """
        count = len(tokens)
        if self._held is None or self._held[0] != count or self._held[1] is not buffers:
            for name, buffer in buffers.items():
                shape = (count, *buffer.shape[1:])
                self._binding.input(f"past_key_values.{name}", buffer, shape)
                self._binding.output(f"present.{name}", buffer, shape)
            self._held = (count, buffers)
        for name, array in live.items():
            if self._live.get(name) is not array:
                self._binding.optional_input(name, array)
        self._live = live
        seen = np.array(lengths, np.int64)[:, None] + 1
        mask = (np.arange(int(seen.max())) < seen).astype(np.int64)
        ids = np.array(tokens, np.int64)[:, None]
        logits = np.empty((count, 1, self._vocab_size), np.float32)
        self._binding.input("input_ids", ids)
        self._binding.input("attention_mask", mask)
        self._binding.output("logits", logits)
        self._binding.run(B=count, S=1, kept=1)
        return logits[:, 0]
