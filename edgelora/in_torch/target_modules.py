"""Checks the names of layers to adapt against a base, before its weights are loaded."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def check_targets(config: Mapping[str, Any], targets: Sequence[str] | None) -> None:
    """Raises InputError for target modules that match no linear layer or embedding of a base, with names that are near.

    A name matches as in PEFT: it is the layer's whole name, or its last parts. config: the base's config.json. targets: None for
    each linear layer.
    """
    if targets is None:
        return
    if not targets:
        raise InputError("target_modules is empty, so no layer would be trained; leave it out for each linear layer")
    layers = list_layers(config)
    unknown = [name for name in targets if not any(layer == name or layer.endswith(f".{name}") for layer in layers)]
    if not layers or not unknown:  # a base that transformers cannot build is refused when it is loaded
        return
    parts = sorted({layer.rpartition(".")[2] for layer in layers})
    near = list(dict.fromkeys(match for name in unknown for match in get_close_matches(name, [*parts, *layers], n=2)))
    raise InputError(
        f"target_modules: no layer of the base is named {', '.join(map(repr, unknown))}; "
        + (f"near are {', '.join(near)}; " if near else "")
        + f"it has {', '.join(parts)}"
    )


def list_layers(config: Mapping[str, Any]) -> list[str]:
    """Returns the names of a base's linear layers and embeddings, in transformers' model of it.

    No weights are made. The list is empty if transformers cannot build the model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM
            model: Any = auto.from_config(AutoConfig.for_model(**config))
    except Exception:  # as many types as there are models
        return []
    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]
