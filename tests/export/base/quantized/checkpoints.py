"""Quantized weights written from each format's description, and what they stand for, by its formula in float64."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    Array = NDArray[Any]

_TORCH = {  # types of ml_dtypes that torch.from_numpy does not take, by a type of the same size that it takes
    np.dtype(ml_dtypes.bfloat16): (np.int16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True)
class Encoded:
    """One weight: its stored parts by the name behind the module's, and its value, float64 (N, K)."""

    parts: dict[str, Array]
    value: Array


class Memory:
    """Tensors in memory. Satisfies Tensors, without a file for each example."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self._tensors = tensors
        self.files = dict.fromkeys(tensors, "model.safetensors")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._tensors[name].dtype

    def read(self, name: str) -> Array:
        return self._tensors[name]

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        return self._tensors[name][start:stop]


def pack(codes: Array, bits: int, word: type[Any] = np.int32) -> Array:
    """Codes (…, n) as words (…, ⌈n·bits/word size⌉), bit by bit, the lowest first."""
    stream = ((codes[..., None].astype(np.int64) >> np.arange(bits)) & 1).astype(np.uint8).reshape(*codes.shape[:-1], -1)
    size = np.dtype(word).itemsize * 8
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % size)])
    return np.packbits(stream, axis=-1, bitorder="little").view(np.dtype(word).newbyteorder("<"))


def _draw(rng: np.random.Generator, *shape: int, dtype: Any = np.float16) -> Array:
    """Scales for weights around 0.1."""
    return rng.uniform(0.005, 0.02, shape).astype(dtype)


def make_gptq(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    size: int = 32,
    first: bool = True,
    shuffled: bool = False,
) -> Encoded:
    """first: zero points are stored less one. shuffled: columns belong to groups in a random order."""
    count = -(-columns // size)
    groups = np.arange(columns) // size
    if shuffled:
        groups = rng.permutation(groups)
    codes = rng.integers(0, 2**bits, (columns, rows))
    zeros = rng.integers(1, 2**bits, (count, rows))
    scales = _draw(rng, count, rows)
    parts = {
        "qweight": np.ascontiguousarray(pack(codes.T, bits).T),
        "qzeros": pack(zeros - first, bits),
        "scales": scales,
        "g_idx": groups.astype(np.int32),
    }
    return Encoded(parts, (scales.astype(np.float64)[groups] * (codes - zeros[groups])).T)


def make_awq(rng: np.random.Generator, rows: int, columns: int, *, size: int = 32, gemv: bool = False) -> Encoded:
    count = columns // size
    groups = np.arange(columns) // size
    codes = rng.integers(0, 16, (columns, rows))
    zeros = rng.integers(0, 16, (count, rows))
    scales = _draw(rng, count, rows)
    value = (scales.astype(np.float64)[groups] * (codes - zeros[groups])).T
    if not gemv:
        order = np.array([8 * word + place for word in range(rows // 8) for place in _AWQ_ORDER])
        return Encoded({"qweight": pack(codes[:, order], 4), "qzeros": pack(zeros[:, order], 4), "scales": scales}, value)
    packed = pack(zeros.T, 4)
    wide = np.zeros((rows, packed.shape[1] * 8), np.float16)
    wide[:, :count] = scales.T
    return Encoded({"qweight": pack(codes.T, 4), "qzeros": packed, "scales": wide}, value)


def make_scaled(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    *,
    block: tuple[int, int],
    kind: Any = ml_dtypes.float8_e4m3fn,
    scale: str = "weight_scale_inv",
    shape: tuple[int, ...] | None = None,
) -> Encoded:
    """float8 or int8 with a scale for each block. shape: the stored scales', if it is not that of the blocks."""
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    scales = _draw(rng, *grid, dtype=np.float32)
    whole = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    codes = whole if kind is np.int8 else rng.normal(0, 12, (rows, columns)).astype(kind)
    spread = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[:rows, :columns]
    stored = scales if shape is None else scales.reshape(shape)
    return Encoded({"weight": codes, scale: stored}, codes.astype(np.float64) * spread.astype(np.float64))


def make_packed(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    size: int = 32,
    symmetric: bool = True,
    shuffled: bool = False,
) -> Encoded:
    """compressed-tensors' pack-quantized."""
    count = columns // size
    groups = np.arange(columns) // size
    if shuffled:
        groups = rng.permutation(groups)
    half = 2 ** (bits - 1)
    codes = rng.integers(-half, half, (rows, columns))
    zeros = rng.integers(-half, half, (rows, count)) * (not symmetric)
    scales = _draw(rng, rows, count, dtype=ml_dtypes.bfloat16)
    parts = {"weight_packed": pack(codes + half, bits), "weight_scale": scales, "weight_shape": np.array([rows, columns])}
    if not symmetric:
        parts["weight_zero_point"] = np.ascontiguousarray(pack((zeros + half).T, bits).T)
    if shuffled:
        parts["weight_g_idx"] = groups.astype(np.int32)
    return Encoded(parts, scales.astype(np.float64)[:, groups] * (codes - zeros[:, groups]))


def make_mlx(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    size: int = 32,
    bias: str = "biases",
    dtype: Any = np.float16,
) -> Encoded:
    groups = np.arange(columns) // size
    codes = rng.integers(0, 2**bits, (rows, columns))
    scales = _draw(rng, rows, columns // size, dtype=dtype)
    biases = -5 * _draw(rng, rows, columns // size, dtype=dtype)
    value = codes * scales.astype(np.float64)[:, groups] + biases.astype(np.float64)[:, groups]
    return Encoded({"weight": pack(codes, bits, np.uint32), "scales": scales, bias: biases}, value)


def make_nvfp4(rng: np.random.Generator, rows: int, columns: int, *, divided: bool = False) -> Encoded:
    """ModelOpt's names and factor, or, divided, those of compressed-tensors."""
    codes = rng.integers(0, 16, (rows, columns))
    scales = rng.uniform(10, 400, (rows, columns // 16)).astype(ml_dtypes.float8_e4m3fn)
    factor = np.array([1e4 if divided else 1e-4], np.float32)
    names = ("weight_packed", "weight_scale", "weight_global_scale") if divided else ("weight", "weight_scale", "weight_scale_2")
    value = _E2M1[codes] * np.repeat(scales.astype(np.float64), 16, 1)
    parts = dict(zip(names, (pack(codes, 4, np.uint8), scales, factor), strict=True))
    return Encoded(parts, value / np.float64(factor) if divided else value * np.float64(factor))


def make_mxfp4(rng: np.random.Generator, rows: int, columns: int) -> Encoded:
    """compressed-tensors' mxfp4-pack-quantized."""
    codes = rng.integers(0, 16, (rows, columns))
    exponents = rng.integers(118, 124, (rows, columns // 32)).astype(np.uint8)
    value = _E2M1[codes] * np.repeat(2.0 ** (exponents.astype(np.float64) - 127), 32, 1)
    return Encoded({"weight_packed": pack(codes, 4, np.uint8), "weight_scale": exponents}, value)


def describe_groups(**weights: Any) -> dict[str, Any]:
    """Settings of compressed-tensors for one group of modules."""
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def save(folder: Path, tensors: Mapping[str, Array], config: Mapping[str, Any]) -> None:
    """Writes tensors and config.json into a folder, over those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: _as_torch(values) for name, values in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def write_base(plain: Path, folder: Path, make: Callable[[int, int], Encoded], settings: Mapping[str, Any]) -> dict[str, Array]:
    """Writes a base whose projections are encoded, and returns what it stands for: float64 by plain name.

    plain: the base that gives config, tokenizer and the other tensors. make: encodes a weight of (rows, columns).
    """
    shutil.copytree(plain, folder)
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    tensors: dict[str, Array] = {}
    values: dict[str, Array] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        values[name] = tensor.numpy().astype(np.float64)
        if name.endswith("proj.weight"):
            encoded = make(*tensor.shape)
            values[name] = encoded.value
            tensors |= {f"{name.removesuffix('weight')}{part}": stored for part, stored in encoded.parts.items()}
        else:
            tensors[name] = tensor.numpy()
    save(folder, tensors, {**config, "quantization_config": dict(settings)})
    return values


def _as_torch(values: Array) -> torch.Tensor:
    values = np.array(values, order="C")
    if values.dtype not in _TORCH:
        return torch.from_numpy(values)
    same_size, kind = _TORCH[values.dtype]
    return torch.from_numpy(values.view(same_size)).view(kind)
