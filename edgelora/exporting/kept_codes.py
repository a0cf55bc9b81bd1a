"""Merge-aware adapters at export: their variants keep the codes that training computed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora.mix.weights import EVERYWHERE
from edgelora_export.plan.variants import Delta, Quantization
from edgelora_export.quantize.int4 import quantize_rtn

if TYPE_CHECKING:
    from collections.abc import Mapping, Set

    import numpy as np
    from numpy.typing import NDArray

    from edgelora.mix.mix import Mix
    from edgelora_export.decoder.description import Decoder, Part

    Floats = NDArray[np.float32]

_GRID = Quantization()  # of merge-aware training


@dataclass(frozen=True)
class MergedOnGrid(Delta):
    """A mix as merge-aware training computed with it: every weight, with ΔW added where the mix has one, is on the int4 grid.

    parts: the decoder's linear layers by module. vocab: the modules of embedding and head.
    """

    mix: Mix
    parts: Mapping[str, Part]
    vocab: Set[str]

    @property
    def modules(self) -> Set[str]:
        return self.parts.keys() | self.vocab

    def dense(self, module: str, weight: Floats) -> Floats:
        """Returns the rounded weight minus the float base's, float32 (N, K)."""
        merged = weight + self.mix.dense(module, weight) if module in self.mix.modules else weight
        part = self.parts.get(module)
        if part is None:
            return quantize_rtn(merged).dequantize() - weight
        return quantize_rtn(part.pad_columns(merged)).dequantize()[:, part.find_columns()] - weight

    @property
    def ties_vocab(self) -> bool:
        """True: a head that shares the embedding's weight shares its codes."""
        return True


def find_kept(mix: Mix, decoder: Decoder) -> MergedOnGrid | None:
    """Returns the weights of training if a mix is one merge-aware adapter, whole and alone. None for any other mix.

    What training saw was that adapter at weight 1. Any other sum has codes that nothing was trained on.
    """
    if len(mix.weights) != 1 or mix.method != "linear":
        return None
    ((name, weight),) = mix.weights.items()
    whole = weight == 1 or weight == {EVERYWHERE: 1}
    provenance = mix.adapters[name].provenance
    if not whole or provenance is None or not provenance.merge_aware:
        return None
    parts = {part.module: part for linear in decoder.linears for part in linear.parts}
    if not mix.modules <= parts.keys() or mix.biased:  # merge-aware training changes no other
        return None
    return MergedOnGrid(mix, parts, {*decoder.vocab_modules.values()})


def same_grid(quantization: Quantization) -> bool:
    """True if a bundle's grid is that of merge-aware training, apart from products that get 8 bits."""
    return (quantization.bits, quantization.block_size, quantization.symmetric) == (_GRID.bits, _GRID.block_size, _GRID.symmetric)


def explain_not_kept(quantization: Quantization) -> str:
    """Explains why a quantized bundle keeps no codes of training, or keeps some only. Returns "" if it keeps all."""
    if not same_grid(quantization):
        used = f"{_GRID.bits} bits, blocks of {_GRID.block_size} and no zero points"
        return f"weights are quantized anew, as merge-aware training used {used}"
    if quantization.int8:
        return f"{', '.join(quantization.int8)} get 8 bits, and merge-aware training used {_GRID.bits}"
    return ""
