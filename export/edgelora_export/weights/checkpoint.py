"""Writes a base with a delta added as a plain Hugging Face checkpoint, with one tensor in memory at a time."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from edgelora_export.base.safetensors_folder import INDEX, NAMES, SINGLE
from edgelora_export.weights.publish import write_file
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from edgelora_export.base.base import Base
    from edgelora_export.base.tensors import Tensors
    from edgelora_export.plan.variants import Delta

DTYPES: Mapping[str, tuple[str, np.dtype[Any]]] = {  # safetensors' names
    "float32": ("F32", np.dtype(np.float32)),
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
_FLOATS = dict(DTYPES.values())


def write_checkpoint(
    base: Base, delta: Delta, folder: Path, dtype: str | None, on_progress: Callable[[int, int, str], None]
) -> None:
    """Fills an empty folder with the base's shards under their own names, the delta added, and its configs and tokenizer.

    dtype: a key of DTYPES for all floating-point weights. None keeps each tensor's own. The modules of the delta must be the
    base's (check_modules). Raises InputError for a sum that the type cannot hold.
    """
    for name, content in base.texts.items():
        if name != "config.json":
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, [content])
    config = dict(base.config)
    if dtype is not None:
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"dtype": dtype}
    write_file(folder / "config.json", [(json.dumps(config, indent=2) + "\n").encode()])
    names: dict[str, list[str]] = {}
    for name, file in sorted(base.tensors.files.items()):
        names.setdefault(file, []).append(name)
    done = total_size = 0

    def report(name: str) -> None:
        nonlocal done
        on_progress(done, len(base.tensors.files), name)
        done += 1

    for file, held in names.items():
        header, size = _make_header(base.tensors, held, dtype)
        total_size += size
        packed = json.dumps(header).encode()
        packed += b" " * (-len(packed) % 8)  # the format aligns the data to 8 bytes
        tensors = _changed_tensors(base.tensors, held, delta, dtype, report)
        write_file(folder / file, _chain(len(packed).to_bytes(8, "little") + packed, tensors))
    if set(names) != {SINGLE}:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(base.tensors.files)}
        write_file(folder / INDEX, [(json.dumps(index, indent=2) + "\n").encode()])


def _make_header(tensors: Tensors, names: Sequence[str], dtype: str | None) -> tuple[dict[str, Any], int]:
    """Makes the safetensors header of a file to write, and counts the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers rejects files without it
    offset = 0
    for name in names:
        own, shape = tensors.dtype(name), tensors.shape(name)
        written = DTYPES[dtype][1] if dtype is not None and own in _FLOATS.values() else own
        size = written.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": NAMES[written], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return header, offset


def _changed_tensors(
    tensors: Tensors, names: Sequence[str], delta: Delta, dtype: str | None, report: Callable[[str], None]
) -> Iterator[memoryview]:
    for name in names:
        report(name)
        values = tensors.read(name)
        own = values.dtype
        wanted = DTYPES[dtype][1] if dtype is not None and own in _FLOATS.values() else own
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in delta.modules:
            weight = values.astype(np.float32)
            values = weight + delta.dense(module, weight)
        with np.errstate(over="ignore"):  # the error below names the tensor
            values = values.astype(wanted, copy=False)
        if wanted in _FLOATS.values() and not np.isfinite(values.astype(np.float32)).all():
            raise InputError(f"{name} holds NaN, infinity or numbers that {wanted} cannot hold; use --dtype float32")
        yield np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _chain(head: bytes, tensors: Iterator[memoryview]) -> Iterator[bytes | memoryview]:
    yield head
    yield from tensors
