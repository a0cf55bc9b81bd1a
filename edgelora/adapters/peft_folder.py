"""PEFT's LoRA folders, whatever a wrapper, torch.compile or an adapter's name put into their keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora.adapters.names import IGNORED, TensorName, parse_name, show_names
from edgelora.adapters.provenance import read_provenance
from edgelora.adapters.tensors import AdapterSource, SafetensorsFactors, read_file_shapes
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def open_peft(folder: Path, label: str, config: Mapping[str, Any]) -> AdapterSource:
    """Opens a folder with adapter_config.json, already read, and adapter_model.safetensors.

    Raises InputError for tensors that belong to no LoRA adapter, and for two that have one meaning.
    """
    path = folder / WEIGHTS
    found = read_file_shapes(path, label)
    keys: dict[str, dict[str, str]] = {}
    names: dict[str, TensorName] = {}
    odd = []
    for key in sorted(found, key=lambda key: (".modules_to_save." in key, key)):  # a copy comes after the layer itself
        name = parse_name(key)
        if name is None:
            odd.append(key)
        elif name.kind != IGNORED:
            names[key] = name
            held = keys.setdefault(name.module, {})
            if name.kind not in held:
                held[name.kind] = key
            elif not name.is_copy:
                raise InputError(f"adapter {label}: {show_names([held[name.kind], key])} are the same tensor of {name.module}")
    if odd:
        raise InputError(
            f"adapter {label}: {show_names(odd)}: such tensors are not supported, they are no part of a LoRA adapter"
        )
    if len(adapters := {name.adapter for name in names.values() if name.adapter}) > 1:
        raise InputError(f"adapter {label}: {path} holds several adapters ({show_names(adapters, 6)}); save each one alone")
    shapes = {module: {kind: found[key] for kind, key in held.items()} for module, held in keys.items()}
    origins = {name.module: name.origin for name in names.values()}
    tensors = SafetensorsFactors(path, keys, shapes, origins)
    return AdapterSource("PEFT", config, tensors, read_provenance(folder), (folder / CONFIG, path))
