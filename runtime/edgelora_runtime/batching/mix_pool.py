"""The packed factors of several live mixes in one graph input, for texts that share a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_runtime.session.factors import FACTORS, PACKED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgelora_runtime.session.factors import LoraInputs

_ALIGNMENT = 64


class MixPool:
    """One array of bytes: minus the number of texts, where the mix of each text begins, and the mixes.

    That is the second form of the input `factors` (docs/reference/bundle-format.md). A mix is copied once, when its first text
    comes. count: the most texts.
    """

    def __init__(self, count: int) -> None:
        self._head = _align(8 * (1 + count))
        self._inputs: Mapping[str, NDArray[Any]] = {}
        self._free = 0  # the first byte after the mixes
        self._places: dict[int, tuple[LoraInputs, int]] = {}  # by identity of the inputs, which are kept alive

    def combine(self, mixes: Sequence[LoraInputs]) -> Mapping[str, NDArray[Any]]:
        """Returns the graph's inputs for a step over texts with these packed mixes, one for each text.

        The next call overwrites the array.
        """
        new = {id(mix): mix for mix in mixes if id(mix) not in self._places}
        if new:
            self._place(new, {id(mix): mix for mix in mixes})
        array = self._inputs[FACTORS]
        head = array[: 8 * (1 + len(mixes))].view(np.int64)
        head[0] = -len(mixes)
        head[1:] = [self._places[id(mix)][1] for mix in mixes]
        return self._inputs

    def clear(self) -> None:
        """Frees all mixes."""
        self._inputs, self._free, self._places = {}, 0, {}

    def _place(self, new: Mapping[int, LoraInputs], all_needed: Mapping[int, LoraInputs]) -> None:
        """Copies new mixes behind the others, or all needed ones to a larger array if there is no room."""
        size = sum(_align(mix[FACTORS].nbytes) for mix in new.values())
        if not self._inputs or self._free + size > self._inputs[FACTORS].nbytes:
            needed = sum(_align(mix[FACTORS].nbytes) for mix in all_needed.values())
            self._inputs = {FACTORS: np.zeros(self._head + 2 * needed + _ALIGNMENT, PACKED)}
            self._free, self._places = self._head, {}
            new = all_needed
        array = self._inputs[FACTORS]
        for key, mix in new.items():
            array[self._free : self._free + mix[FACTORS].nbytes] = mix[FACTORS]
            self._places[key] = (mix, self._free)
            self._free += _align(mix[FACTORS].nbytes)


def _align(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
