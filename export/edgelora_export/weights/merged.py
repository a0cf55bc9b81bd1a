"""Reads the base's weights in float32, one matrix at a time, with a variant's delta added."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

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


def read_rows(base: Base, name: str, rows: NDArray[np.int64]) -> Floats:
    """Reads rows (R, K) of a matrix of the base, in ascending order, without reading the whole matrix."""
    chunks = [
        base.rows(name, int(first), int(last) + 1)[chunk - first]
        for chunk in np.split(rows, np.flatnonzero(np.diff(rows // _BATCH_ROWS)) + 1)
        for first, last in [(chunk[0], chunk[-1])]
    ]
    return np.concatenate(chunks)


def read_bias(base: Base, linear: Linear) -> Floats:
    """Reads a product's bias (N,) in the graph's layout."""
    return np.concatenate([part.pad_rows(base.tensor(f"{part.module}.bias")) for part in linear.parts])


def read_norm(base: Base, norm: Norm) -> Floats:
    """Reads a norm's weight in the graph's layout."""
    return norm.lay_out(base.tensor(norm.tensor))


def vocab_modules(decoder: Decoder) -> dict[str, str]:
    """Names the checkpoint's modules of the vocabulary matrices: `embedding` and, unless it is tied, `head`."""
    tensors = {"embedding": decoder.embedding} if decoder.tied else {"embedding": decoder.embedding, "head": decoder.head}
    return {name: tensor.removesuffix(".weight") for name, tensor in tensors.items()}


def read_vocab_matrix(base: Base, decoder: Decoder, name: str, delta: Delta | None) -> Floats:
    """Reads the whole weight (V, H) of the `embedding` or the `head`, with the delta added if it changes it."""
    module = vocab_modules(decoder)[name]
    weight = base.tensor(f"{module}.weight")
    return weight + delta.dense(module, weight) if delta is not None and module in delta.modules else weight


def iterate_vocab_rows(base: Base, decoder: Decoder, name: str, delta: Delta | None) -> Iterator[Floats]:
    """Reads the same weight some rows at a time, or all at once if the delta changes a vocabulary matrix."""
    if changes_vocab(delta, decoder):
        yield read_vocab_matrix(base, decoder, name, delta)
        return
    for start in range(0, decoder.vocab_size, _BATCH_ROWS):
        yield base.rows(f"{vocab_modules(decoder)[name]}.weight", start, min(start + _BATCH_ROWS, decoder.vocab_size))


def changes_linear(delta: Delta | None, linear: Linear) -> bool:
    """True if a delta changes any part of a product."""
    return delta is not None and not delta.modules.isdisjoint(linear.modules)


def changes_vocab(delta: Delta | None, decoder: Decoder) -> bool:
    """True if a delta changes the embedding or the head."""
    return delta is not None and not delta.modules.isdisjoint(vocab_modules(decoder).values())


def check_modules(decoder: Decoder, modules: Iterable[str], owner: str, *, vocab: bool = False) -> None:
    """Raises one InputError for all modules that are not linear layers of the decoder.

    vocab: True allows the embedding and the head, too, unless they are tied.
    """
    known = {module for linear in decoder.linears for module in linear.modules}
    if vocab:
        tied = set(modules) & {vocab_modules(decoder)["embedding"], "lm_head"}
        if decoder.tied and tied:
            raise InputError(
                f"{owner} changes {', '.join(sorted(tied))}, but this base ties its head to its embedding, and it is unclear "
                "which of the two should change; untie them (tie_word_embeddings) and train the adapter on that base"
            )
        known |= set(vocab_modules(decoder).values())
    if unknown := sorted(set(modules) - known):
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise InputError(f"{owner} changes {shown}, which are not linear layers of this {decoder.architecture} decoder")
