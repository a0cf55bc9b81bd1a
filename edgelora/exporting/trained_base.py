"""A mix on the quantized base of training, as a change of the float base.

The base is in NF4 or int4.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, cast

from edgelora_export.plan.adapted_decoder import adapt_decoder
from edgelora_export.plan.variants import Delta, TrainedBase
from edgelora_export.quantize.int4 import quantize_rtn
from edgelora_runtime.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Set

    import numpy as np
    from numpy.typing import NDArray

    from edgelora.mix.mix import Mix
    from edgelora_export.decoder.description import Decoder

    Floats = NDArray[np.float32]
    Held = Literal["nf4", "int4"]

NF4_BLOCK = 64  # weights that share a scale: bitsandbytes' default for Linear4bit


def hold_weight(weight: Floats, quantization: Held) -> Floats:
    """A weight (N, K) as training held it: quantized, then dequantized to float32.

    nf4: by bitsandbytes, with double quantization. int4: on the grid that export writes. On a GPU, training quantizes from 16
    bits, which may move a value near the middle of two codes.
    """
    if quantization == "int4":
        return quantize_rtn(weight).dequantize()
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(torch.from_numpy(weight), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
    held: Floats = dequantize_4bit(codes, state).numpy()
    return held


@dataclass(frozen=True)
class OnTrainedBase(Delta):
    """A mix on the quantized base of training.

    held: modules whose weights training held in 4 bits. changed: the modules that change. The others keep the float weights.
    """

    mix: Mix
    quantization: Held
    held: Set[str]
    changed: Set[str]

    @property
    def modules(self) -> Set[str]:
        return self.changed

    def dense(self, module: str, weight: Floats) -> Floats:
        """Returns the replacement of the float base's weight (N, K), minus that weight: float32 (N, K)."""
        base = hold_weight(weight, self.quantization) if module in self.held else weight
        change = base - weight
        return change + self.mix.dense(module, base) if module in self.mix.modules else change

    @property
    def biased(self) -> Set[str]:
        return self.mix.biased

    @property
    def vocab_size(self) -> int | None:
        return self.mix.vocab_size

    @property
    def ties_vocab(self) -> bool:
        return self.mix.ties_vocab

    def bias(self, module: str, base_bias: Floats | None) -> Floats:
        """Returns the mix's Δb (N,). Training holds biases as they are."""
        return self.mix.bias(module, base_bias)


def find_quantization(mix: Mix) -> Held | None:
    """Finds how training held the base of a mix.

    Returns None if it was unquantized, is unknown, or differs between adapters.
    """
    found = {mix.adapters[name].trained_on for name in mix.weights}
    return cast("Held", found.pop()) if len(found) == 1 and found <= {"nf4", "int4"} else None


def read_trained_base(mix: Mix, quantization: Held, decoder: Decoder) -> TrainedBase:
    """Returns a mix on its trained base, in the exporter's form.

    bitsandbytes quantizes the decoder's linear layers, but not the embedding and the head. int4 quantizes these as well. Raises
    MissingExtraError for nf4 without bitsandbytes.
    """
    if quantization == "nf4" and find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "train")
    held = {module for linear in decoder.linears for module in linear.modules}
    if quantization == "int4":
        held |= set(adapt_decoder(decoder, mix).vocab_modules.values())
    return TrainedBase(
        quantization,
        merged=OnTrainedBase(mix, quantization, held, mix.modules),
        unmerged=OnTrainedBase(mix, quantization, held, held | mix.modules),
    )
