"""Folders that mlx-lm writes: adapters.safetensors with transposed factors, and a scale in place of α.

The layout is that of lora.py, dora.py and utils.py at
https://github.com/ml-explore/mlx-lm/tree/200af25dd5b26d1711317970fe44b5acf365faab/mlx_lm/tuner.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from edgelora.adapters.names import EMBEDDING, EMBEDDING_A, EMBEDDING_B, HEAD, MAGNITUDE, A, B, plain_module, show_names
from edgelora.adapters.provenance import read_provenance
from edgelora.adapters.tensors import AdapterSource, SafetensorsFactors, read_file_shapes
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MLX_WEIGHTS = "adapters.safetensors"
_KEY = re.compile(r"(?P<module>.+)\.(?P<kind>lora_a|lora_b|m)")
_KINDS = {"lora_a": A, "lora_b": B, "m": MAGNITUDE}
_EMBEDDING_KINDS = {"lora_a": EMBEDDING_A, "lora_b": EMBEDDING_B, "m": MAGNITUDE}
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


def is_mlx(config: Mapping[str, Any]) -> bool:
    """True for an adapter_config.json of mlx-lm's."""
    return "peft_type" not in config and ("fine_tune_type" in config or "lora_parameters" in config)


def open_mlx(folder: Path, label: str, config: Mapping[str, Any]) -> AdapterSource:
    """Opens a folder with adapter_config.json, already read, and adapters.safetensors.

    lora_a (K, r) and lora_b (r, N) are Aᵀ and Bᵀ, and ΔW is scale · B · A. Raises InputError for fully tuned models and for
    tensors of other layers than linear ones and the embedding.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise InputError(
            f"adapter {label}: fine_tune_type is {kind!r}: it holds whole weights, not LoRA factors; fuse it (mlx_lm.fuse) and "
            "take the result as a base"
        )
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    rank = parameters.get("rank") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or isinstance(rank, bool) or not isinstance(rank, int):
        raise InputError(f"adapter {label}: lora_parameters gives rank {rank!r} and scale {scale!r}; both should be numbers")
    path = folder / MLX_WEIGHTS
    keys: dict[str, dict[str, str]] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    origins, odd = {}, []
    for key, shape in read_file_shapes(path, label).items():
        found = _KEY.fullmatch(key)
        if found is None or len(shape) != (1 if found["kind"] == "m" else 2):
            odd.append(key)
            continue
        module = plain_module(found["module"])
        name = (_EMBEDDING_KINDS if module == EMBEDDING else _KINDS)[found["kind"]]
        if name in keys.setdefault(module, {}):
            raise InputError(f"adapter {label}: {show_names([keys[module][name], key])} are the same tensor of {module}")
        keys[module][name] = key
        shapes.setdefault(module, {})[name] = shape[::-1]
        origins[module] = found["module"]
    if odd:
        raise InputError(f"adapter {label}: {show_names(odd)}: such tensors are not supported, only those of linear layers are")
    as_peft = {
        "peft_type": "LORA",
        "base_model_name_or_path": config.get("model"),
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": _list_targets(parameters),
        "use_dora": kind == "dora",
        "ensure_weight_tying": True,  # LoRAEmbedding.as_linear: a tied head gets the embedding's change
    }
    tensors = SafetensorsFactors(path, keys, shapes, origins, transposed=True)
    files = (folder / "adapter_config.json", path)
    return AdapterSource("MLX", as_peft, tensors, read_provenance(folder), files, _note_layers(config, keys))


def _list_targets(parameters: Any) -> list[str] | None:
    keys = parameters.get("keys")
    return [str(key) for key in keys] if isinstance(keys, list) and keys else None


def _note_layers(config: Mapping[str, Any], modules: Mapping[str, Any]) -> tuple[str, ...]:
    """Compares the layers that have factors with num_layers, which counts from the last one. -1 is all of them."""
    wanted = config.get("num_layers", config.get("lora_layers"))
    layers = {int(found[1]) for module in modules if module not in (EMBEDDING, HEAD) and (found := _LAYER.match(module))}
    if isinstance(wanted, int) and 0 < wanted != len(layers):
        return (f"num_layers is {wanted}, but factors of {len(layers)} layers are stored",)
    return ()
