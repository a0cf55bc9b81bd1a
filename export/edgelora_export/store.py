"""Stores a decoder's weights as blobs: once for the base, and again only what a variant's delta touches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.blobs import StoredTensor, write_blob
from edgelora_export.int4 import quantize_rtn
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora_export.base import Base
    from edgelora_export.decoder import Decoder, Linear
    from edgelora_export.variants import Delta, Quantization

    Floats = NDArray[np.float32]

Tensors = dict[str, StoredTensor]


def store_shared(base: Base, decoder: Decoder, folder: Path) -> Tensors:
    """What no adapter of ours changes: norms, biases, rotary tables."""
    norms = write_blob(folder, {name: base.tensor(name) for name in decoder.norms})
    rotary = write_blob(folder, {"rotary.cos": decoder.rotary_cos, "rotary.sin": decoder.rotary_sin})
    tensors = {**norms, **rotary}
    biases = {f"{linear.name}.bias": _read_bias(base, linear) for linear in decoder.linears if linear.bias}
    return tensors | (write_blob(folder, biases) if biases else {})


def store_linear(base: Base, linear: Linear, delta: Delta | None, folder: Path, quantization: Quantization) -> Tensors:
    """One product's weight, with a delta added where it has one for a part; shapes are checked by check_delta."""
    rows = []
    for part in linear.parts:
        weight = base.tensor(f"{part.module}.weight")
        if weight.shape != (part.out_features, part.in_features):
            raise InputError(
                f"{part.module}.weight has shape {weight.shape}; config.json means {(part.out_features, part.in_features)}"
            )
        if delta is not None and part.module in delta.modules:
            weight = weight + delta.dense(part.module, weight)
        rows.append(part.pad_columns(part.pad_rows(weight)))
    return _store_matrix(folder, linear.name, np.concatenate(rows), quantization)


def store_ends(base: Base, decoder: Decoder, delta: Delta | None, folder: Path, quantization: Quantization) -> Tensors:
    """The embedding, and the head where it is not the same tensor, with a delta added to what it changes of them."""
    stored: Tensors = {}
    for name, module in _end_modules(decoder).items():
        weight = base.tensor(f"{module}.weight")
        if delta is not None and module in delta.modules:
            weight = weight + delta.dense(module, weight)
        stored |= _store_matrix(folder, name, weight, quantization)
    return stored


def touches_ends(delta: Delta | None, decoder: Decoder) -> bool:
    """Whether a delta changes the embedding or the head."""
    return delta is not None and not delta.modules.isdisjoint(_end_modules(decoder).values())


def _end_modules(decoder: Decoder) -> dict[str, str]:
    """Checkpoint modules of the embedding and, unless tied to it, of the head."""
    ends = {"embedding": decoder.embedding} if decoder.tied else {"embedding": decoder.embedding, "head": decoder.head}
    return {name: tensor.removesuffix(".weight") for name, tensor in ends.items()}


def touches(delta: Delta | None, linear: Linear) -> bool:
    """Whether a delta changes any part of a product."""
    return delta is not None and not delta.modules.isdisjoint(linear.modules)


def check_modules(decoder: Decoder, modules: Iterable[str], owner: str, *, ends: bool = False) -> None:
    """Refuses modules that are no linear layer of the decoder, nor, with `ends`, its embedding or head, in one message."""
    known = {module for linear in decoder.linears for module in linear.modules}
    if ends:
        tied = set(modules) & {_end_modules(decoder)["embedding"], "lm_head"}
        if decoder.tied and tied:
            raise InputError(
                f"{owner} changes {', '.join(sorted(tied))}, and this base ties its head to its embedding: whether one or both "
                "should change is not known; untie them (tie_word_embeddings) and train the adapter on that base"
            )
        known |= set(_end_modules(decoder).values())
    if unknown := sorted(set(modules) - known):
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise InputError(f"{owner} changes {shown}, which are no linear layers of this {decoder.architecture} decoder")


def _read_bias(base: Base, linear: Linear) -> Floats:
    return np.concatenate([part.pad_rows(base.tensor(f"{part.module}.bias")) for part in linear.parts])


def _store_matrix(folder: Path, name: str, weight: Floats, quantization: Quantization) -> Tensors:
    """A weight (N, K) as codes and scales under its name, or as itself where nothing is quantized."""
    if quantization.bits == 32:
        return write_blob(folder, {name: weight})
    matrix = quantize_rtn(weight, bits=quantization.bits, block_size=quantization.block_size, symmetric=quantization.symmetric)
    tensors: Mapping[str, NDArray[Any] | None] = {
        f"{name}.codes": matrix.codes,
        f"{name}.scales": matrix.scales,
        f"{name}.zero_points": matrix.zero_points,
    }
    return write_blob(folder, {key: tensor for key, tensor in tensors.items() if tensor is not None})
