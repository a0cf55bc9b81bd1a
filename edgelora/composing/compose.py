"""Writes a mix as an adapter: a PEFT folder, or a GGUF file for llama.cpp. edgelora can export both."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgelora.adapters.checks import check_factors, check_shapes
from edgelora.adapters.folder import (
    CONFIG,
    WEIGHTS,
    Adapter,
    Provenance,
    find_template_options,
    open_adapters,
    write_provenance,
)
from edgelora.adapters.gguf_file import SUFFIX
from edgelora.composing.gguf_adapter import check_gguf_output, find_base_config, write_gguf
from edgelora.composing.mergekit_config import read_mergekit
from edgelora.composing.mergekit_mix import MergekitMix
from edgelora.mix.methods import DEFAULT_DENSITY
from edgelora.mix.mix import Mix
from edgelora_export.architectures import native_types, read_decoder
from edgelora_export.base.base import Base
from edgelora_export.weights.publish import staged_folder, write_file
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Set
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora.mix.weights import Weight

    Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ComposeReport:
    """The result of composing.

    rank: the largest over the modules. largest_error, mean_error: the error ‖ΔW - B·A‖ / ‖ΔW‖ over the modules, 0 where the rank
    represents the mix exactly. notes: what the adapters' configs name and their files lack.
    """

    output: Path
    modules: int
    rank: int
    largest_error: float
    mean_error: float
    notes: tuple[str, ...] = ()


class Composition(Protocol):
    """A mix that can be written as factors: a Mix, or a mergekit configuration."""

    @property
    def adapters(self) -> Mapping[str, Adapter]: ...

    @property
    def modules(self) -> Set[str]: ...

    def factors_with_error(self, module: str, rank: int | None = None) -> tuple[Floats, Floats, float]: ...

    def describe(self) -> str: ...


def compose(
    adapters: Mapping[str, tuple[Path | str, Weight]],
    output: Path,
    *,
    method: str = "linear",
    density: float = DEFAULT_DENSITY,
    seed: int = 0,
    rank: int | None = None,
    base: str | None = None,
    dtype: str = "float32",
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> ComposeReport:
    """Mixes adapters, given as name → (folder or GGUF file, weight), into one adapter.

    Methods on factors are exact, and their rank is at most the sum of the ranks. Other methods give the nearest matrices of that
    rank. rank: truncates both kinds to this rank, or to less where a module has less. The report gives the errors.
    output: a folder in PEFT's layout, or a file named *.gguf for llama.cpp. base: folder or hub id, whose config GGUF adapters
    need. None for the folder that an adapter names. dtype: of a GGUF file: float32, float16 or bfloat16.
    Raises InputError for adapters that cannot be mixed, and for an output that exists and is not an adapter, MissingExtraError
    for a GGUF file without the package gguf.
    """
    if not adapters:
        raise InputError("no adapter to compose; give at least one as NAME=FOLDER:WEIGHT")
    config = Base.find(base).config if base else None
    notes: list[str] = []
    opened = open_adapters({name: folder for name, (folder, _) in adapters.items()}, base=config, on_note=notes.append)
    for note in notes:
        on_note(note)
    if config is not None and config.get("model_type") in native_types():
        check_shapes(opened, read_decoder(dict(config)))
    mix = Mix(opened, {name: weight for name, (_, weight) in adapters.items()}, method, density, seed)
    return replace(write_mix(mix, output, rank=rank, base=base, dtype=dtype, on_progress=on_progress), notes=tuple(notes))


def write_mix(
    mix: Composition,
    output: Path,
    *,
    rank: int | None = None,
    base: str | None = None,
    dtype: str = "float32",
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> ComposeReport:
    """Writes a mix as one adapter, as compose() does.

    All adapters of the mix take part.
    """
    check_composable(mix.adapters)
    factors: dict[str, tuple[Floats, Floats]] = {}
    errors: list[float] = []
    modules = sorted(mix.modules)
    if not modules:
        raise InputError("the weights are 0 in every module: there is nothing to compose")
    names = None
    if output.suffix == SUFFIX:
        names = check_gguf_output(output, dict.fromkeys(modules), find_base_config(base, mix.adapters))
    for done, module in enumerate(modules):
        on_progress(done, len(modules), module)
        a, b, error = mix.factors_with_error(module, rank)
        factors[module] = a, b
        errors.append(error)
    on_progress(len(modules), len(modules), "writing")
    described = f"composed: {mix.describe()}" + (f", cut to rank {rank}" if rank else "")
    provenance = derive_provenance(mix.adapters, described, factors)
    if names is not None:
        write_gguf(output, factors, names, provenance, dtype)
    else:
        write_composed(output, factors, next(iter(mix.adapters.values())), provenance)
    return ComposeReport(output, len(modules), max(len(a) for a, _ in factors.values()), max(errors), fmean(errors))


def check_composable(adapters: Mapping[str, Adapter]) -> None:
    """Raises InputError for adapters of which a set of factors of linear layers cannot hold a mix.

    Those are embeddings, biases, DoRA, and layers saved whole.
    """
    check_factors(adapters, "such a mix cannot be composed into an adapter; export it merged")


def write_composed(
    output: Path, factors: Mapping[str, tuple[Floats, Floats]], first: Adapter, provenance: Provenance | None
) -> None:
    """Writes factors A (r, K) and B (N, r) by module as a PEFT folder.

    Scales are folded in. first: one of the mixed adapters.
    """
    tensors: dict[str, NDArray[np.float32]] = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    config = _peft_config({module: len(a) for module, (a, _) in factors.items()}, first)
    with staged_folder(output, marker=CONFIG) as folder:
        write_file(folder / CONFIG, [(json.dumps(config, indent=1) + "\n").encode()])
        write_file(folder / WEIGHTS, _pack(tensors))
        if provenance is not None:
            write_provenance(folder, provenance)


def compose_mergekit(
    path: Path | str,
    output: Path,
    *,
    seed: int = 0,
    rank: int | None = None,
    base: str | None = None,
    dtype: str = "float32",
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> ComposeReport:
    """Writes the merge that a mergekit YAML file describes as one adapter.

    See compose and read_mergekit.
    """
    config = read_mergekit(path)
    for note in config.notes:
        on_note(f"{path}: {note}")
    return write_mix(MergekitMix.open(config, seed), output, rank=rank, base=base, dtype=dtype, on_progress=on_progress)


def _pack(tensors: Mapping[str, NDArray[np.float32]]) -> Iterator[bytes | memoryview]:
    """Yields a safetensors file in pieces.

    The library's own writer would copy all tensors twice.
    """
    header, offset = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)  # the format aligns data to 8 bytes
    yield len(packed).to_bytes(8, "little") + packed
    for values in tensors.values():
        yield np.ascontiguousarray(values, "<f4").data


def _peft_config(ranks: Mapping[str, int], first: Adapter) -> dict[str, object]:
    """Makes PEFT's config, with α = r for each module. The scale is then 1."""
    common = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": first.config.get("base_model_name_or_path"),
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": bool(first.config.get("fan_in_fan_out")),  # a property of the base's layers: PEFT sets it for GPT-2
    }


def derive_provenance(
    adapters: Mapping[str, Adapter], init: str, factors: Mapping[str, tuple[Floats, Floats]]
) -> Provenance | None:
    """Derives the provenance of a mix.

    Returns None if an adapter has none, as it is then not known to share the base.
    """
    origins = [adapter.provenance for adapter in adapters.values()]
    if any(origin is None for origin in origins):
        return None
    first = next(origin for origin in origins if origin is not None)
    held = {origin.base_quantization for origin in origins if origin is not None}
    rank = max(len(a) for a, _ in factors.values())
    return Provenance(
        base_name=first.base_name,
        base_sha256=first.base_sha256,
        base_quantization=first.base_quantization if len(held) == 1 else "mixed",
        data_sha256="",
        data_rows=0,
        init=init,
        seed=0,
        rank=rank,
        alpha=float(rank),
        steps=0,
        learning_rate=0.0,
        template_options=find_template_options(adapters),
    )
