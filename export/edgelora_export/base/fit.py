"""Checks that a base's tensors are those that its config describes, before anybody trains on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora_export.architectures import native_types, read_decoder
from edgelora_export.base.head import HEAD
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgelora_export.base.tensors import Tensors
    from edgelora_export.decoder.description import Decoder

_SHOWN = 3  # mismatches in the message


def check_fit(config: Mapping[str, Any], tensors: Tensors, where: Path) -> None:
    """Checks that export can read a base: its settings have a graph, and each tensor is there in the shape that they give.

    So every verb that opens a base takes what export takes. No tensor is read. A base without a native graph is not checked,
    as only transformers knows its names.
    Raises InputError for a setting without an equivalent, and for tensors that are absent or do not fit.
    """
    if config.get("model_type") not in native_types():
        return
    decoder = read_decoder(dict(config), 1)  # one position: the tables are not needed
    shapes = list_shapes(decoder)
    if (bare := decoder.embedding.removeprefix("model.")) in tensors.files:
        raise InputError(
            f"base {where} has {bare} for {decoder.embedding}: it was saved without the language head, as embedding models are; "
            "give the …ForCausalLM model that it was made from"
        )
    if HEAD in shapes and HEAD not in tensors.files and decoder.embedding in tensors.files:
        raise InputError(
            f"base {where} has no {HEAD}, and config.json does not say tie_word_embeddings = true; it is a model without a "
            "language head, as embedding models are, or a download that lacks a file"
        )
    wrong = []
    for name, shape in shapes.items():
        if name not in tensors.files:
            wrong.append(f"{name} is absent")
        elif (found := tensors.shape(name)) != shape:
            wrong.append(f"{name} is {found}, not {shape}")
        elif tensors.dtype(name).kind in "biu":
            wrong.append(f"{name} holds {tensors.dtype(name)} codes, not weights")
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise InputError(f"base {where} does not fit its config.json: {', '.join(wrong[:_SHOWN])}{more}; download it again")


def list_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Lists every tensor that a decoder reads from its checkpoint, with its shape there."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        (decoder.embedding, decoder.head), (decoder.vocab_size, decoder.hidden_size)
    )
    for norm in decoder.norms:
        shapes[norm.tensor] = (decoder.hidden_size if norm.heads is None else norm.heads.heads * norm.heads.size,)
    for linear in decoder.linears:
        for part in linear.parts:
            shapes[f"{part.module}.weight"] = (part.out_features, part.in_features)
            if linear.bias:
                shapes[f"{part.module}.bias"] = (part.out_features,)
    return shapes
