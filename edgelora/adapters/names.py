"""The names of an adapter's tensors: from every writer's form to one module name and one kind.

A module has the name that the text-only checkpoint gives it: model.layers.0.self_attn.q_proj, model.embed_tokens, lm_head.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

# Kinds, with shapes. r: rank, K: inputs, N: outputs, V: rows of the vocabulary, H: hidden size, T: tokens.
A, B = "lora_A.weight", "lora_B.weight"  # (r, K), (N, r)
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"  # (r, V), (H, r)
MAGNITUDE = "lora_magnitude_vector"  # (N,)
FACTOR_BIAS = "lora_B.bias"  # (N,), scaled as B is
WEIGHT, BASE_WEIGHT = "weight", "base_layer.weight"  # (N, K), a layer saved whole, and what the factors of one add to
BIAS, BASE_BIAS = "bias", "base_layer.bias"  # (N,), a bias saved whole
TOKENS = "trainable_tokens_delta"  # (T, H), the rows of some tokens
IGNORED = ""  # a copy of something of the base's

WHOLE = (WEIGHT, BASE_WEIGHT)
SAVED_BIASES = (BIAS, BASE_BIAS)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

# What torch.compile, FSDP, activation checkpointing and DDP put into a name.
_INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LEADING = ("base_model.model.", "module.")
_WRAPPERS = r"(?:model\.|language_model\.|text_model\.)*"
_LAYER = re.compile(rf"{_WRAPPERS}(layers\.\d+\..+|embed_tokens)")
_HEAD = re.compile(rf"{_WRAPPERS}lm_head")
_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?(?:\.(?P<part>weight|bias))?"
)
_OTHERS = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"(?P<module>.+?)\.(?:token_adapter\.)?trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?", TOKENS),
        (r"(?P<module>.+?)\.(?:token_adapter\.)?(?:trainable_tokens_original|token_indices)(?:\.[^.]+)?", IGNORED),
        (r"(?P<module>.+?)\.original_module\.(?:weight|bias)", IGNORED),
        (r"(?P<module>.+?)\.modules_to_save(?:\.(?P<adapter>[^.]+))?\.(?P<part>weight|bias)", ""),
        (r"(?P<module>.+?)\.(?:token_adapter\.)?(?P<part>base_layer\.weight|base_layer\.bias)", ""),
        (r"(?P<module>.+?)\.(?P<part>weight|bias)", ""),
    )
)


class TensorName(NamedTuple):
    """What a tensor's name says.

    module: as in a text-only checkpoint. origin: as in the model that it was trained in, which the patterns of PEFT's config
    match. kind: one of the constants of this module. adapter: the adapter's name inside PEFT, "" where the name has none.
    is_copy: True for PEFT's second copy of a layer saved whole.
    """

    module: str
    origin: str
    kind: str
    adapter: str = ""
    is_copy: bool = False


def parse_name(name: str) -> TensorName | None:
    """Parses a tensor's name as PEFT, torch.compile, DDP, FSDP or a multimodal wrapper spell it.

    Returns None for a name that is no tensor of a LoRA adapter.

    >>> parse_name("module.base_model.model.model.language_model.layers.3.mlp.up_proj.lora_A.default.weight")[:2]
    ('model.layers.3.mlp.up_proj', 'model.language_model.layers.3.mlp.up_proj')
    """
    name = _INSIDE.sub("", name)
    while prefix := next((prefix for prefix in _LEADING if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    if found := _FACTOR.fullmatch(name):
        kind, part = found["kind"], found["part"]
        if kind in ("lora_A", "lora_B"):
            kind = f"{kind}.{part}"
            if kind not in (A, B, FACTOR_BIAS):
                return None
        elif part == "bias":
            return None
        return TensorName(plain_module(found["module"]), found["module"], kind, found["adapter"] or "")
    for pattern, kind in _OTHERS:
        if found := pattern.fullmatch(name):
            groups = found.groupdict()
            is_copy = ".modules_to_save." in name
            return TensorName(
                plain_module(groups["module"]),
                groups["module"],
                kind or groups.get("part") or IGNORED,
                groups.get("adapter") or "",
                is_copy,
            )
    return None


def plain_module(module: str) -> str:
    """Returns the name that a text-only checkpoint gives a module of a text model, alone or inside a multimodal wrapper.

    >>> [plain_module(name) for name in ("language_model.model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj", "model.lm_head")]
    ['model.layers.0.mlp.up_proj', 'model.layers.0.mlp.up_proj', 'lm_head']
    """
    if found := _LAYER.fullmatch(module):
        return f"model.{found[1]}"
    return HEAD if _HEAD.fullmatch(module) else module


def show_names(names: Iterable[str], count: int = 3) -> str:
    """Lists a few names for a message, in order and printable, and how many more there are."""
    ordered = sorted("".join(filter(str.isprintable, name))[:120] for name in names)
    more = len(ordered) - count
    return ", ".join(ordered[:count]) + (f" and {more} more" if more > 0 else "")
