"""Reads the base's weights in float32, one matrix at a time, with a variant's delta added."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelora_export.decoder.description import HEAD_MODULE
from edgelora_export.plan.adapted_decoder import find_vocab_module
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from edgelora_export.base.base import Base
    from edgelora_export.decoder.description import Decoder, Linear, Norm, Part
    from edgelora_export.plan.variants import Delta

    Floats = NDArray[np.float32]

_BATCH_ROWS = 8192  # of a matrix, read at once


def read_linear(base: Base, linear: Linear, delta: Delta | None) -> Floats:
    """Reads a product's weight (N, K) in the graph's layout, with the delta added to the parts that it changes."""
    return np.concatenate([part.pad_columns(part.pad_rows(read_part(base, part, delta))) for part in linear.parts])


def read_part(base: Base, part: Part, delta: Delta | None) -> Floats:
    """Reads the weight (N, K) of one part in the checkpoint's layout, with the delta added if it changes the part."""
    weight = base.tensor(f"{part.module}.weight")
    if weight.shape != (part.out_features, part.in_features):
        raise InputError(
            f"{part.module}.weight has shape {weight.shape}; config.json gives {(part.out_features, part.in_features)}"
        )
    return weight + delta.dense(part.module, weight) if delta is not None and part.module in delta.modules else weight


def read_bias(base: Base, linear: Linear, delta: Delta | None = None) -> Floats:
    """Reads a product's bias (N,) in the graph's layout, with the delta added to the parts that it biases."""
    return np.concatenate([part.pad_rows(read_part_bias(base, linear, part, delta)) for part in linear.parts])


def read_part_bias(base: Base, linear: Linear, part: Part, delta: Delta | None) -> Floats:
    """Reads the bias (N,) of one part in the checkpoint's layout, 0 if neither the checkpoint nor the delta has one."""
    stored = None if linear.new_bias else base.tensor(f"{part.module}.bias")
    bias = np.zeros(part.out_features, np.float32) if stored is None else stored
    if delta is None or part.module not in delta.biased:
        return bias
    change = delta.bias(part.module, stored)
    if change.shape != bias.shape:
        raise InputError(f"the bias of {part.module} has shape {change.shape}; its layer has {part.out_features} outputs")
    return bias + change


def read_norm(base: Base, norm: Norm) -> Floats:
    """Reads a norm's weight in the graph's layout."""
    return norm.lay_out(base.tensor(norm.tensor))


def read_vocab_matrix(base: Base, decoder: Decoder, product: str, delta: Delta | None) -> Floats:
    """Reads the whole weight (V, H) of the `embedding` or the `head`, with the delta added if it changes it.

    V is the decoder's vocab_size, whatever number of rows the checkpoint has. See read_vocab_rows.
    """
    weight = read_vocab_rows(base, decoder, product, 0, decoder.vocab_size)
    module = find_vocab_module(decoder, product, delta)
    if delta is None or module is None:
        return weight
    change = delta.dense(module, weight)
    if change.shape != weight.shape:
        raise InputError(f"the change of {module} has shape {change.shape}; the variant's has {weight.shape}")
    return weight + change


def read_vocab_rows(base: Base, decoder: Decoder, product: str, start: int, stop: int) -> Floats:
    """Reads some rows of the base's `embedding` or `head` (stop - start, H). Those that the checkpoint lacks are 0."""
    stored = _count_rows(base, decoder, product)
    if stop <= stored:
        return base.rows(decoder.vocab_tensors[product], start, stop)
    rows = np.zeros((stop - start, decoder.hidden_size), np.float32)
    if start < stored:
        rows[: stored - start] = base.rows(decoder.vocab_tensors[product], start, stored)
    return rows


def iterate_vocab_rows(base: Base, decoder: Decoder, product: str, delta: Delta | None) -> Iterator[Floats]:
    """Reads the same weight as read_vocab_matrix some rows at a time, or all at once if the delta changes it."""
    if find_vocab_module(decoder, product, delta) is not None:
        yield read_vocab_matrix(base, decoder, product, delta)
        return
    for start in range(0, decoder.vocab_size, _BATCH_ROWS):
        yield read_vocab_rows(base, decoder, product, start, min(start + _BATCH_ROWS, decoder.vocab_size))


def embed_tokens(base: Base, decoder: Decoder, tokens: NDArray[np.int64], delta: Delta | None) -> Floats:
    """Reads the embedding's rows (T, H) of tokens in ascending order, with the delta added.

    The whole matrix is read only if the delta changes it.
    """
    if find_vocab_module(decoder, "embedding", delta) is not None:
        return read_vocab_matrix(base, decoder, "embedding", delta)[tokens]
    known = tokens[tokens < _count_rows(base, decoder, "embedding")]
    rows = np.zeros((len(tokens), decoder.hidden_size), np.float32)
    if len(known):
        rows[: len(known)] = read_rows(base, decoder.embedding, known)
    return rows


def read_rows(base: Base, name: str, rows: NDArray[np.int64]) -> Floats:
    """Reads rows (R, K) of a matrix of the base, in ascending order, without reading the whole matrix."""
    chunks = [
        base.rows(name, int(first), int(last) + 1)[chunk - first]
        for chunk in np.split(rows, np.flatnonzero(np.diff(rows // _BATCH_ROWS)) + 1)
        for first, last in [(chunk[0], chunk[-1])]
    ]
    return np.concatenate(chunks)


def changes_linear(delta: Delta | None, linear: Linear) -> bool:
    """True if a delta changes the weight of any part of a product."""
    return delta is not None and not delta.modules.isdisjoint(linear.modules)


def changes_bias(delta: Delta | None, linear: Linear) -> bool:
    """True if a delta changes the bias of any part of a product."""
    return delta is not None and not delta.biased.isdisjoint(linear.modules)


def check_delta(decoder: Decoder, delta: Delta, owner: str) -> None:
    """Raises one InputError for all that a variant of this decoder cannot have: modules, biases, a vocabulary size.

    decoder: the base's, which is not adapted to the delta.
    """
    check_modules(decoder, delta.modules, owner, vocab=True)
    linears = {module for linear in decoder.linears for module in linear.modules}
    if unknown := sorted(set(delta.biased) - linears):
        raise InputError(
            f"{owner} changes the bias of {_list_some(unknown)}, but only linear layers of a {decoder.architecture} decoder's "
            "blocks can have one; train the adapter with bias = 'none' or 'lora_only'"
        )
    if delta.vocab_size is not None and delta.vocab_size < 1:
        raise InputError(f"{owner} has a vocabulary of {delta.vocab_size} tokens; it needs at least 1")


def check_vocab(base: Base, decoder: Decoder) -> None:
    """Raises InputError if the base's embedding or head is not of the size that its config gives."""
    for tensor in decoder.vocab_tensors.values():
        if tensor in base and base.tensors.shape(tensor) != (decoder.vocab_size, decoder.hidden_size):
            raise InputError(
                f"{tensor} of base {base.path} has shape {base.tensors.shape(tensor)}; config.json gives "
                f"{(decoder.vocab_size, decoder.hidden_size)}"
            )


def check_modules(decoder: Decoder, modules: Iterable[str], owner: str, *, vocab: bool = False) -> None:
    """Raises one InputError for all modules that are not linear layers of the decoder.

    vocab: True allows the embedding and the head, too.
    """
    known = {module for linear in decoder.linears for module in linear.modules}
    if vocab:
        known |= {decoder.embedding.removesuffix(".weight"), HEAD_MODULE}
    if unknown := sorted(set(modules) - known):
        raise InputError(
            f"{owner} changes {_list_some(unknown)}, which are not linear layers of this {decoder.architecture} decoder"
        )


def _count_rows(base: Base, decoder: Decoder, product: str) -> int:
    """Counts the rows of a vocabulary matrix in the checkpoint."""
    return base.tensors.shape(decoder.vocab_tensors[product])[0]


def _list_some(modules: list[str]) -> str:
    return ", ".join(modules[:5]) + (f" and {len(modules) - 5} more" if len(modules) > 5 else "")
