"""The config and the tensors of a checkpoint to write: the base's with a delta added, and what the delta brings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from edgelora_export.architectures import read_decoder
from edgelora_export.decoder.description import HEAD_MODULE
from edgelora_export.plan.adapted_decoder import adapt_decoder, add_biases, find_own_matrices
from edgelora_export.weights.merged import changes_bias, read_part_bias, read_vocab_matrix
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from edgelora_export.base.base import Base
    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.variants import Delta

DTYPES: Mapping[str, tuple[str, np.dtype[Any]]] = {  # safetensors' names
    "float32": ("F32", np.dtype(np.float32)),
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
FLOATS = frozenset(dtype for _, dtype in DTYPES.values())
_BIAS_FLAGS = (("attention_bias",), ("mlp_bias",), ("attention_bias", "mlp_bias"))  # to try, in architectures that have them
_HEAD = f"{HEAD_MODULE}.weight"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write: its file, its shape and type there, and the function that computes it."""

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], NDArray[Any]]

    def convert(self, dtype: str | None) -> PlannedTensor:
        """Returns the tensor in another type, a key of DTYPES. None keeps its own, and so does a tensor that holds no floats."""
        return self if dtype is None or self.dtype not in FLOATS else replace(self, dtype=DTYPES[dtype][1])


def plan_checkpoint(base: Base, decoder: Decoder, delta: Delta) -> tuple[dict[str, Any], dict[str, PlannedTensor]]:
    """Plans the config and the tensors, by name, of the base with a delta added.

    decoder: the base's. No weight is read yet. Raises InputError for a bias that the kind of model has no place for.
    """
    adapted = adapt_decoder(decoder, delta)
    config, biased = _flag_biases(base, decoder, adapted, delta)
    if adapted.vocab_size != decoder.vocab_size:
        config["vocab_size"] = adapted.vocab_size
    if adapted.untied:
        config["tie_word_embeddings"] = False
    planned = {name: _plan_linear(base, name, delta) for name in base.tensors.files}
    planned |= _plan_vocab(base, decoder, adapted, delta)
    return config, planned | _plan_biases(base, biased, delta)


def _plan_linear(base: Base, name: str, delta: Delta) -> PlannedTensor:
    """Plans a tensor that the base has, with the delta added if it is a weight that the delta changes."""
    tensors, module = base.tensors, name.removesuffix(".weight")

    def read() -> NDArray[Any]:
        values = tensors.read(name)
        if not name.endswith(".weight") or module not in delta.modules:
            return values
        weight = values.astype(np.float32)
        return weight + delta.dense(module, weight)

    return PlannedTensor(tensors.files[name], tensors.shape(name), tensors.dtype(name), read)


def _plan_vocab(base: Base, decoder: Decoder, adapted: Decoder, delta: Delta) -> dict[str, PlannedTensor]:
    """Plans the embedding and the head if they differ from the base's, or if the head gets a tensor of its own."""
    like = _plan_linear(base, decoder.embedding, delta)
    own = find_own_matrices(decoder, adapted, delta)
    names = {"embedding": decoder.embedding, "head": _HEAD if adapted.untied else decoder.head}
    if adapted.tied and own and _HEAD in base:  # a copy of the tied matrix, which would be out of date
        names["copy"] = _HEAD
        own.append("copy")
    if adapted.untied and "head" not in own:
        own.append("head")

    def plan(product: str) -> PlannedTensor:
        source = "embedding" if product == "copy" else product
        return replace(
            like,
            shape=(adapted.vocab_size, adapted.hidden_size),
            read=lambda: read_vocab_matrix(base, adapted, source, delta),
        )

    return {names[product]: plan(product) for product in own}


def _plan_biases(base: Base, decoder: Decoder, delta: Delta) -> dict[str, PlannedTensor]:
    """Plans the biases that a delta changes, and those that the checkpoint lacks. decoder: of the config that is written."""
    planned = {}
    for linear in decoder.linears:
        for part in linear.parts if linear.new_bias or changes_bias(delta, linear) else ():
            weight, name = f"{part.module}.weight", f"{part.module}.bias"
            planned[name] = PlannedTensor(
                base.tensors.files[weight],
                (part.out_features,),
                base.tensors.dtype(weight),
                lambda linear=linear, part=part: read_part_bias(base, linear, part, delta),  # type: ignore[misc]
            )
    return planned


def _flag_biases(base: Base, decoder: Decoder, adapted: Decoder, delta: Delta) -> tuple[dict[str, Any], Decoder]:
    """Sets the flags in config.json that new biases need.

    Returns the config, and the decoder that it describes, in which the biases that the checkpoint lacks are new. One flag stands
    for several layers, so there may be more of them than the delta brings.
    """
    config, wanted = dict(base.config), {linear.name for linear in adapted.linears if linear.new_bias}
    if not wanted:
        return config, decoder
    for flags in _BIAS_FLAGS:
        flagged = config | dict.fromkeys(flags, True)
        described = [linear for linear in read_decoder(flagged, decoder.context_length).linears if linear.bias]
        if wanted <= {linear.name for linear in described}:
            return flagged, add_biases(decoder, {module for linear in described for module in linear.modules})
    module = min(each for linear in adapted.linears if linear.new_bias for each in delta.biased & set(linear.modules))
    raise InputError(
        f"a checkpoint of {decoder.architecture} has no place for a bias of {module}; export the adapter into a bundle, whose "
        "graphs have one"
    )
