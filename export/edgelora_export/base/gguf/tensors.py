"""The tensors of GGUF files under transformers' names, dequantized row by row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from edgelora_export.base.gguf.header import count_bytes
from edgelora_export.base.safetensors_folder import SINGLE
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgelora_export.base.gguf.header import Place
    from edgelora_export.base.gguf.names import Source

_CHUNK = 1 << 22  # entries that are dequantized at once
_PLAIN = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 28: np.dtype(np.float64), 30: np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class GgufTensors:
    """The tensors of a GGUF base. Satisfies Tensors.

    sources: where each tensor lies and what the writer of the file did to it, by transformers' name. A checkpoint that is written
    from them has one safetensors file.
    """

    sources: Mapping[str, Source]

    @property
    def files(self) -> Mapping[str, str]:
        return dict.fromkeys(self.sources, SINGLE)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.sources[name].place.shape

    def dtype(self, name: str) -> np.dtype[Any]:
        source = self.sources[name]
        return np.dtype(np.float32) if source.offset else _PLAIN.get(source.place.kind, np.dtype(np.float32))

    def read(self, name: str) -> NDArray[Any]:
        shape = self.shape(name)
        return self.read_rows(name, 0, shape[0]) if len(shape) > 1 else self._read_vector(name)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        source = self.sources[name]
        if not source.heads:
            return self._finish(name, read_rows(source.place, name, start, stop))
        order = paired_order(source.place.shape[0], source.heads)[start:stop]
        low, high = int(order.min()), int(order.max()) + 1
        return self._finish(name, read_rows(source.place, name, low, high)[order - low])

    def _read_vector(self, name: str) -> NDArray[Any]:
        source = self.sources[name]
        values = read_rows(source.place, name, 0, 1).reshape(-1)
        return self._finish(name, values[paired_order(len(values), source.heads)] if source.heads else values)

    def _finish(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        offset = self.sources[name].offset
        return values.astype(np.float32) - np.float32(offset) if offset else values


def paired_order(rows: int, heads: int) -> NDArray[np.int64]:
    """Returns which row of the file each row of transformers' matrix is, (rows,).

    transformers rotates the two halves of a head against each other. llama.cpp rotates neighbours, so its converter interleaves
    the halves (LlamaModel.permute in
    https://github.com/ggml-org/llama.cpp/blob/a38b884c6c4b0c256583acfaaabdf556c62fabea/convert_hf_to_gguf.py#L1402).

    >>> paired_order(8, heads=2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def read_rows(place: Place, name: str, start: int, stop: int) -> NDArray[Any]:
    """Reads rows (stop - start, ...) of a tensor: in its own type if that is a plain one, else dequantized to float32.

    A vector is one row. Raises InputError if the file was cut since it was opened.
    """
    import gguf

    columns = place.shape[-1] if len(place.shape) == 1 else math.prod(place.shape[1:])
    rows = 1 if len(place.shape) == 1 else place.shape[0]
    stop = min(stop, rows)
    row_bytes = count_bytes(place, name) // rows
    plain = _PLAIN.get(place.kind)
    values = np.empty((stop - start, columns), plain or np.float32)
    step = max(1, _CHUNK // columns)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        try:
            raw = np.fromfile(place.path, np.uint8, (last - first) * row_bytes, offset=place.offset + first * row_bytes)
        except OSError as error:
            raise InputError(f"{place.path} cannot be read ({error.strerror or error})") from error
        if len(raw) < (last - first) * row_bytes:
            raise InputError(f"{place.path} was cut after it was opened, inside {name}; download it again")
        if plain:
            values[first - start : last - start] = raw.view(plain).reshape(-1, columns)
        else:
            # Blocks never cross rows, so that all rows can pass as one, which gguf dequantizes in one go.
            kind = gguf.GGMLQuantizationType(place.kind)
            values[first - start : last - start] = gguf.dequantize(raw.reshape(1, -1), kind).reshape(-1, columns)
    return values.reshape(-1, *place.shape[1:]) if len(place.shape) > 1 else values
