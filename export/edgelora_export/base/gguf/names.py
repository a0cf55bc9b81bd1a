"""Finds, for each tensor that transformers names, its place in a GGUF file and what the writer of the file did to it.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#standardized-tensor-names
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora_export.base.gguf.header import Header, Place

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_GEMMA2 = _LLAMA | _POST_NORMS | {"ffn_norm": "pre_feedforward_layernorm"}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_OLMO2 = {name: module for name, module in _LLAMA.items() if not name.endswith("_norm")} | _HEAD_NORMS | _POST_NORMS
_PHI3 = {name: module for name, module in _LLAMA.items() if name not in ("attn_q", "attn_k", "attn_v", "ffn_gate")} | _FUSED
# The modules of a block, by GGUF's names, per general.architecture.
BLOCKS: Mapping[str, Mapping[str, str]] = {
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA2 | _HEAD_NORMS,
    "granite": _LLAMA,
    "llama": _LLAMA,
    "olmo2": _OLMO2,
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | _HEAD_NORMS,
    "smollm3": _LLAMA,
}
# Architectures whose queries and keys llama.cpp rotates in neighbouring pairs (llama_model_rope_type in
# https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp, LLAMA_ROPE_TYPE_NORM).
_PAIRED = ("granite", "llama", "smollm3")
_PLUS_ONE = ("gemma2", "gemma3")  # their norms are stored as the factor itself, 1 + weight
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_BLOCK_NAME = re.compile(r"blk\.(\d{1,4})\.(.+)")


@dataclass(frozen=True)
class Source:
    """The source of a tensor: its place, and what must be undone.

    heads: of a matrix whose heads' halves are interleaved, 0 for any other. offset: what the file added to the weight.
    """

    place: Place
    heads: int = 0
    offset: float = 0.0


def find_sources(header: Header, architecture: str, heads: int, kv_heads: int) -> dict[str, Source]:
    """Finds the source of each tensor, by transformers' name.

    Raises InputError for tensors that a model of this architecture does not have: to leave them out would change what it says.
    """
    sources: dict[str, Source] = {}
    unknown: list[str] = []
    for name, place in header.tensors.items():
        if name in ROPE_FACTORS:
            continue
        module, _, suffix = name.rpartition(".")
        known = _name_module(module, architecture)
        if known is None or suffix not in ("weight", "bias"):
            unknown.append(name)
            continue
        paired = {"attn_q": heads, "attn_k": kv_heads}.get(module.rpartition(".")[2], 0) if architecture in _PAIRED else 0
        if paired and place.shape[0] % (2 * paired):
            raise InputError(f"{name} in {place.path} has {place.shape[0]} rows, which are not {paired} heads of an even size")
        offset = 1.0 if architecture in _PLUS_ONE and module.endswith("norm") else 0.0
        sources[f"{known}.{suffix}"] = Source(place, paired, offset)
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise InputError(f"{shown}: a {architecture} model as edgelora builds it has no such tensors in GGUF")
    return sources


def _name_module(module: str, architecture: str) -> str | None:
    """Returns transformers' name of a module, None if this architecture has no such module."""
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    if (match := _BLOCK_NAME.fullmatch(module)) is None or match[2] not in BLOCKS[architecture]:
        return None
    return f"model.layers.{int(match[1])}.{BLOCKS[architecture][match[2]]}"
