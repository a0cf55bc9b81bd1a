"""Writes a base with a delta added as a plain Hugging Face checkpoint, with one tensor in memory at a time."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora_export.base.safetensors_folder import INDEX, NAMES, SINGLE
from edgelora_export.weights.planned_checkpoint import DTYPES as DTYPES  # re-exported
from edgelora_export.weights.planned_checkpoint import FLOATS, PlannedTensor, plan_checkpoint
from edgelora_export.weights.publish import write_file
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from edgelora_export.base.base import Base
    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.variants import Delta


def write_checkpoint(
    base: Base,
    decoder: Decoder,
    delta: Delta,
    folder: Path,
    dtype: str | None,
    on_progress: Callable[[int, int, str], None],
) -> None:
    """Fills an empty folder with the base's shards under their own names, the delta added, and its configs and tokenizer.

    decoder: the base's. The config gets the delta's vocab_size, tie_word_embeddings and flags of biases, and the tensors that
    these ask for are added.
    dtype: a key of DTYPES for all floating-point weights. None keeps each tensor's own. The delta must fit the base
    (check_delta). Raises InputError for a sum that the type cannot hold, and for biases that this kind of model has no place for.
    """
    for name, content in base.texts.items():
        if name != "config.json":
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, [content])
    config, written = plan_checkpoint(base, decoder, delta)
    if dtype is not None:
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"dtype": dtype}
    write_file(folder / "config.json", [(json.dumps(config, indent=2) + "\n").encode()])
    names: dict[str, list[str]] = {}
    for name, tensor in sorted(written.items()):
        names.setdefault(tensor.file, []).append(name)
    done = total_size = 0

    def report(name: str) -> None:
        nonlocal done
        on_progress(done, len(written), name)
        done += 1

    for file, held in names.items():
        tensors = {name: written[name].convert(dtype) for name in held}
        header, size = _make_header(tensors)
        total_size += size
        packed = json.dumps(header).encode()
        packed += b" " * (-len(packed) % 8)  # the format aligns the data to 8 bytes
        write_file(folder / file, _chain(len(packed).to_bytes(8, "little") + packed, _read_tensors(tensors, report)))
    if set(names) != {SINGLE}:
        weight_map = {name: tensor.file for name, tensor in written.items()}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_file(folder / INDEX, [(json.dumps(index, indent=2) + "\n").encode()])


def _make_header(tensors: Mapping[str, PlannedTensor]) -> tuple[dict[str, Any], int]:
    """Makes the safetensors header of a file to write, and counts the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers rejects files without it
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.dtype.itemsize * int(np.prod(tensor.shape, dtype=np.int64))
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [offset, offset + size]}
        offset += size
    return header, offset


def _read_tensors(tensors: Mapping[str, PlannedTensor], report: Callable[[str], None]) -> Iterator[memoryview]:
    for name, tensor in tensors.items():
        report(name)
        with np.errstate(over="ignore"):  # the error below names the tensor
            values = tensor.read().astype(tensor.dtype, copy=False)
        if tensor.dtype in FLOATS and not np.isfinite(values.astype(np.float32)).all():
            raise InputError(f"{name} holds NaN, infinity or numbers that {tensor.dtype} cannot hold; use --dtype float32")
        yield np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _chain(head: bytes, tensors: Iterator[memoryview]) -> Iterator[bytes | memoryview]:
    yield head
    yield from tensors
