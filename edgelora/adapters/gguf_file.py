"""GGUF adapters, which llama.cpp loads with --lora: their names, the order of their rows, and their reader.

The layout is that of llama.cpp's src/llama-adapter.cpp and convert_lora_to_gguf.py at
https://github.com/ggml-org/llama.cpp/tree/fdfa89f12e75c37bc0883891151b5f93c2239126.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelora.adapters.names import EMBEDDING, EMBEDDING_A, EMBEDDING_B, HEAD, A, B, show_names
from edgelora.adapters.provenance import parse_provenance
from edgelora.adapters.tensors import AdapterSource
from edgelora_runtime.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from edgelora.adapters.provenance import Provenance

    Floats = NDArray[np.float32]

SUFFIX, MAGIC = ".gguf", b"GGUF"
ALPHA, PROVENANCE_KEY = "adapter.lora.alpha", "edgelora.provenance"
ARCHITECTURES = {  # llama.cpp's name, by transformers' model_type
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "granite": "granite",
    "llama": "llama",
    "ministral3": "mistral3",
    "mistral": "llama",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
# llama.cpp rotates neighbouring entries of a head in these, transformers those half a head apart (LlamaModel.permute).
_PERMUTED = ("granite", "llama", "mistral3", "smollm3")
_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ENDS = {"token_embd": EMBEDDING, "output": HEAD}
_FUSED = {"phi3": {"ffn_up": "mlp.gate_up_proj"}}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d{1,6})\.)?(?P<part>\w+)\.weight\.(?P<kind>lora_[ab])")


@dataclass(frozen=True)
class Heads:
    """The number of attention heads: of queries, and of keys and values."""

    query: int
    key: int


@dataclass(frozen=True)
class GGUFNames:
    """The names and the order of rows of one architecture.

    architecture: llama.cpp's name of it. heads: None if the base is not known.
    """

    architecture: str
    heads: Heads | None

    def module(self, layer: str | None, part: str) -> str | None:
        """Returns the module of blk.LAYER.PART, or of PART outside of the layers. Returns None for an unknown one."""
        if layer is None:
            return _ENDS.get(part)
        name = (_MODULES | _FUSED.get(self.architecture, {})).get(part)
        return None if name is None else f"model.layers.{layer}.{name}"

    def tensor(self, module: str) -> str | None:
        """Returns the name of a module's weight, such as blk.0.attn_q.weight. Returns None for a module that llama.cpp lacks."""
        ends = {module: part for part, module in _ENDS.items()}
        parts = {name: part for part, name in (_MODULES | _FUSED.get(self.architecture, {})).items()}
        if module in ends:
            return f"{ends[module]}.weight"
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        return f"blk.{found[1]}.{parts[found[2]]}.weight" if found and found[2] in parts else None

    def is_permuted(self, module: str) -> bool:
        return self.architecture in _PERMUTED and module.endswith(("self_attn.q_proj", "self_attn.k_proj"))

    def permute(self, module: str, rows: Floats) -> Floats:
        """Returns the rows (N, …) of a module in llama.cpp's order: the two halves of each head interleaved."""
        return self._swap(module, rows, halves_first=True)

    def unpermute(self, module: str, rows: Floats) -> Floats:
        """Returns rows (N, …) in transformers' order, from llama.cpp's."""
        return self._swap(module, rows, halves_first=False)

    def _swap(self, module: str, rows: Floats, *, halves_first: bool) -> Floats:
        if not self.is_permuted(module):
            return rows
        assert self.heads is not None
        count = self.heads.query if module.endswith("q_proj") else self.heads.key
        if len(rows) % (2 * count):
            raise InputError(f"{module} has {len(rows)} rows, which {count} heads do not divide; was it trained on another base?")
        half = len(rows) // count // 2
        pair = (2, half) if halves_first else (half, 2)
        return rows.reshape(count, *pair, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def read_heads(config: Mapping[str, Any]) -> Heads | None:
    """Reads the number of heads from a base's config.json. Returns None if it has none."""
    query = config.get("num_attention_heads")
    key = config.get("num_key_value_heads") or query
    return Heads(query, key) if isinstance(query, int) and isinstance(key, int) and query > 0 and key > 0 else None


@dataclass(frozen=True)
class GGUFFactors:
    """The tensors of a GGUF adapter, dequantized and in transformers' order of rows. Satisfies AdapterTensors."""

    path: Path
    names: GGUFNames
    tensors: Mapping[str, Mapping[str, Any]]
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    origins: Mapping[str, str]

    def read(self, module: str, kind: str) -> NDArray[Any]:
        import gguf

        if kind == B and self.names.is_permuted(module) and self.names.heads is None:
            raise InputError(
                f"{self.path}: llama.cpp orders the rows of {module} by heads, whose number the file does not say; give the base "
                "(--base)"
            )
        tensor = self.tensors[module][kind]
        try:
            values: Floats = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise InputError(
                f"{self.path}: {tensor.name} is stored as {tensor.tensor_type.name}, which cannot be read"
            ) from error
        if kind == EMBEDDING_A:
            return values.T
        return self.names.unpermute(module, values) if kind == B else values


def is_gguf(path: Path) -> bool:
    """True for a file that starts as GGUF files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_gguf(path: Path, label: str, base: Mapping[str, Any] | None) -> AdapterSource:
    """Opens a GGUF adapter.

    base: the config of its base, which tells the number of heads where the file does not. llama.cpp orders the rows of queries
    and keys by it, so that they cannot be read without. Raises InputError for a file that is no LoRA adapter, MissingExtraError
    without the package gguf.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    except Exception as error:  # the reader has no error type of its own, and fails in numpy's and struct's
        raise InputError(f"adapter {label}: {path} is not a readable GGUF file ({type(error).__name__})") from error
    kinds = {key: fields.get(key) for key in ("general.type", "adapter.type")}
    if kinds != {"general.type": "adapter", "adapter.type": "lora"}:
        found = ", ".join(f"{key} {value!r}" for key, value in kinds.items())
        raise InputError(f"adapter {label}: {path} is not a LoRA adapter ({found}); a whole model is a base")
    if fields.get("adapter.alora.invocation_tokens"):
        raise InputError(f"adapter {label}: {path} is an activated LoRA, which changes the weights after some tokens alone")
    architecture = str(fields.get("general.architecture"))
    if architecture not in ARCHITECTURES.values():
        known = ", ".join(sorted({*ARCHITECTURES.values()}))
        raise InputError(f"adapter {label}: general.architecture is {architecture!r}; known are {known}")
    names = GGUFNames(architecture, _find_heads(fields, architecture) or (read_heads(base) if base else None))
    tensors: dict[str, dict[str, Any]] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    odd = []
    for tensor in reader.tensors:
        parsed = _NAME.fullmatch(tensor.name)
        module = names.module(parsed["layer"], parsed["part"]) if parsed else None
        if parsed is None or module is None:
            odd.append(tensor.name)
            continue
        first, second = (EMBEDDING_A, EMBEDDING_B) if module == EMBEDDING else (A, B)
        kind = first if parsed["kind"] == "lora_a" else second
        shape = tuple(int(size) for size in tensor.shape)  # in ggml's order, the last axis first
        tensors.setdefault(module, {})[kind] = tensor
        shapes.setdefault(module, {})[kind] = shape if kind == EMBEDDING_A else shape[::-1]
    if odd:
        raise InputError(f"adapter {label}: {show_names(odd)}: such tensors are not supported, only LoRA factors are")
    config = _make_config(fields.get(ALPHA), shapes, label)
    found_in = GGUFFactors(path, names, tensors, shapes, {module: module for module in tensors})
    return AdapterSource("GGUF", config, found_in, _read_provenance(fields, path), (path,))


def _find_heads(fields: Mapping[str, Any], architecture: str) -> Heads | None:
    prefix = f"{architecture}.attention.head_count"
    return read_heads({"num_attention_heads": fields.get(prefix), "num_key_value_heads": fields.get(f"{prefix}_kv")})


def _make_config(alpha: Any, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], label: str) -> dict[str, Any]:
    """Makes a config in PEFT's terms. llama.cpp scales by α / r, and by 1 where α is 0 or absent."""
    if alpha is not None and not isinstance(alpha, int | float):
        raise InputError(f"adapter {label}: {ALPHA} is {alpha!r}, not a number")
    ranks = {
        module: held[B if B in held else EMBEDDING_B][-1] for module, held in shapes.items() if {B, EMBEDDING_B} & held.keys()
    }
    config: dict[str, Any] = {"peft_type": "LORA", "lora_alpha": float(alpha or 1.0)}
    return config if alpha else config | {"alpha_pattern": {re.escape(module): rank for module, rank in ranks.items()}}


def _read_provenance(fields: Mapping[str, Any], path: Path) -> Provenance | None:
    raw = fields.get(PROVENANCE_KEY)
    if raw is None:
        return None
    try:
        value = json.loads(raw)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {PROVENANCE_KEY} is not JSON") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: {PROVENANCE_KEY} is not an object")
    return parse_provenance(value, f"{path}: {PROVENANCE_KEY}")
