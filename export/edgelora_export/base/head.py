"""Finds out whether a base's head is its embedding, by its tensors more than by its config, as transformers 5 does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.architectures import native_types, read_decoder
from edgelora_export.base.tensors import RenamedTensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora_export.base.tensors import Tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # in every architecture with a native graph
_ROWS = 4096  # compared at a time


def settle_head(config: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Makes config and tensors agree on the head.

    A stored head that differs from a tied embedding unties them, and a stored head without an embedding is both.
    https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/modeling_utils.py, tie_weights
    """
    settled = dict(config)
    if config.get("model_type") not in native_types() or HEAD not in tensors.files or not read_decoder(settled, 1).tied:
        return settled, tensors
    if EMBEDDING not in tensors.files:
        return settled, RenamedTensors(tensors, {EMBEDDING if name == HEAD else name: name for name in tensors.files})
    if not _are_equal(tensors):
        settled["tie_word_embeddings"] = False
    return settled, tensors


def _are_equal(tensors: Tensors) -> bool:
    """Compares head and embedding row by row, up to the first that differs."""
    shape = tensors.shape(EMBEDDING)
    if tensors.shape(HEAD) != shape or len(shape) != 2:
        return False
    for start in range(0, shape[0], _ROWS):
        embedding, head = (tensors.read_rows(name, start, min(start + _ROWS, shape[0])) for name in (EMBEDDING, HEAD))
        if not np.array_equal(embedding, head):
            return False
    return True
