"""Writes factors as a GGUF adapter, which llama.cpp loads with --lora.

The layout is described in edgelora.adapters.gguf_file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.adapters.gguf_file import ALPHA, ARCHITECTURES, PROVENANCE_KEY, GGUFNames, is_gguf, read_heads
from edgelora.adapters.names import HEAD, show_names
from edgelora.adapters.provenance import pack_provenance
from edgelora_export.base.base import Base
from edgelora_export.base.files import read_json
from edgelora_export.weights.full_disk import told_by_name
from edgelora_export.weights.lock import locked
from edgelora_runtime.errors import InputError, MissingExtraError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgelora.adapters.folder import Adapter
    from edgelora.adapters.provenance import Provenance

    Floats = NDArray[np.float32]

_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # gguf's names


def find_base_config(base: str | None, adapters: Mapping[str, Adapter]) -> Mapping[str, Any]:
    """Finds the config of the adapters' base: the one that is given, or the folder that an adapter's config names.

    Raises InputError if there is none.
    """
    if base is not None:
        return Base.find(base).config
    for adapter in adapters.values():
        named = adapter.config.get("base_model_name_or_path")
        if isinstance(named, str) and Path(named, "config.json").is_file():
            return read_json(Path(named, "config.json"), "the base of an adapter has it")
    raise InputError("a GGUF adapter has its base's architecture and number of heads in it; give the base with --base")


def check_gguf_output(output: Path, modules: Mapping[str, object], config: Mapping[str, Any]) -> GGUFNames:
    """Checks, before the work, that an adapter of these modules can be written. Returns its names.

    Raises InputError for an architecture or a module that llama.cpp lacks, and for an output that exists and is another file.
    MissingExtraError without the package gguf.
    """
    try:
        import gguf as gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    if output.exists() and not is_gguf(output):
        raise InputError(f"{output} exists and is not a GGUF file; choose another --output or remove it")
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise InputError(f"model_type {kind!r} cannot be written as GGUF; use one of {', '.join(ARCHITECTURES)}")
    names = GGUFNames(ARCHITECTURES[kind], read_heads(config))
    if names.heads is None:
        raise InputError("the base's config.json has no num_attention_heads, by which llama.cpp orders rows")
    if unknown := [module for module in modules if names.tensor(module) is None]:
        raise InputError(f"llama.cpp's {names.architecture} has no {show_names(unknown)}; write a PEFT folder instead")
    if HEAD in modules and config.get("tie_word_embeddings"):
        raise InputError("llama.cpp has no head of its own for a base that ties it to the embedding; write a PEFT folder instead")
    return names


def write_gguf(
    output: Path,
    factors: Mapping[str, tuple[Floats, Floats]],
    names: GGUFNames,
    provenance: Provenance | None,
    dtype: str = "float32",
) -> None:
    """Writes factors A (r, K) and B (N, r) by module as a GGUF adapter, in one step. Scales are folded in.

    llama.cpp scales by α / r. α is the largest rank, and each B makes up for its own. dtype: float32, float16 or bfloat16.
    Raises InputError for factors that the type cannot hold and while another process writes the file, ResourceError for a full
    disk.
    """
    import gguf

    if dtype not in _TYPES:
        raise InputError(f"dtype {dtype!r} is not known; use one of {', '.join(_TYPES)}")
    kind = gguf.GGMLQuantizationType[_TYPES[dtype]]
    alpha = max(len(a) for a, _ in factors.values())
    staging = output.with_name(f".{output.name}.edgelora-staging")
    output.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path=None, arch=names.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(ALPHA, float(alpha))
    assert names.heads is not None
    writer.add_head_count(names.heads.query)
    writer.add_head_count_kv(names.heads.key)
    if provenance is not None:
        writer.add_string(PROVENANCE_KEY, pack_provenance(provenance))
    for module, (a, b) in sorted(factors.items()):
        rows = names.permute(module, b * np.float32(len(a) / alpha))
        for suffix, values in (("lora_a", a), ("lora_b", rows)):
            with np.errstate(over="ignore"):
                packed = gguf.quantize(np.ascontiguousarray(values, np.float32), kind)
            if not np.isfinite(gguf.dequantize(packed, kind)).all():
                raise InputError(f"{module} has factors that {dtype} cannot hold; use --dtype float32")
            writer.add_tensor(f"{names.tensor(module)}.{suffix}", packed, raw_dtype=kind)
    with told_by_name(output), locked(output):
        try:
            writer.write_header_to_file(path=staging)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            with staging.open("rb+") as file:
                os.fsync(file.fileno())
            _check_whole(staging, output)
            staging.replace(output)
        finally:
            writer.close()
            staging.unlink(missing_ok=True)


def _check_whole(written: Path, output: Path) -> None:
    """Raises ResourceError for a file that was cut short, as gguf and numpy drop some errors of a full disk."""
    import gguf

    try:
        whole = bool(gguf.GGUFReader(written).tensors)
    except (ValueError, IndexError, OSError):
        whole = False
    if not whole:
        raise ResourceError(f"{output} was cut short; free some space or raise `ulimit -f`, and run again")
