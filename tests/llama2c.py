"""Reads models and tokenizers in the llama2.c format (https://github.com/karpathy/llama2.c) into the Hugging Face layout."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

BOS, EOS = 1, 2


@dataclass(frozen=True)
class Header:
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int


def read_checkpoint(path: Path) -> tuple[Header, dict[str, Floats]]:
    """The header and the tensors of a version-0 checkpoint, under Hugging Face names; q and k rows permuted."""
    raw = path.read_bytes()
    header = Header(*struct.unpack("<7i", raw[:28]))
    values = np.frombuffer(raw, "<f4", offset=28)
    at = 0

    def take(*shape: int) -> Floats:
        nonlocal at
        size = int(np.prod(shape))
        part = values[at : at + size].reshape(shape)
        at += size
        return np.ascontiguousarray(part, np.float32)

    dim, hidden, layers = header.dim, header.hidden, header.layers
    head_size = dim // header.heads
    kv_dim = header.kv_heads * head_size
    tensors = {"model.embed_tokens.weight": take(header.vocab, dim)}
    stacked = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv_dim, dim),
        "self_attn.v_proj": take(layers, kv_dim, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),  # w1
        "mlp.down_proj": take(layers, dim, hidden),  # w2
        "mlp.up_proj": take(layers, hidden, dim),  # w3
    }
    for name, heads in (("self_attn.q_proj", header.heads), ("self_attn.k_proj", header.kv_heads)):
        stacked[name] = np.stack([permute_rows(weight, heads) for weight in stacked[name]])
    for name, layered in stacked.items():
        for index, tensor in enumerate(layered):
            tensors[f"model.layers.{index}.{name}.weight"] = np.ascontiguousarray(tensor)
    tensors["model.norm.weight"] = take(dim)
    at += header.context * head_size  # freq_cis_real and freq_cis_imag, half a head each
    if header.vocab < 0:
        raise ValueError("an untied head (negative vocabulary) is not read here")
    if at != values.size:
        raise ValueError(f"{path} has {values.size} floats, {at} were read")
    return header, tensors


def permute_rows(weight: Floats, heads: int) -> Floats:
    """From pairs (2i, 2i+1) that turn together to pairs (i, i + half), head by head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


@dataclass(frozen=True)
class Vocabulary:
    """tokenizer.bin: a score and the bytes of each token; encoding merges the best-scored neighbours, as run.c does."""

    scores: list[float]
    pieces: list[bytes]

    @classmethod
    def read(cls, path: Path, size: int) -> Vocabulary:
        raw = path.read_bytes()
        at = 4  # the longest token's length
        scores, pieces = [], []
        for _ in range(size):
            score, length = struct.unpack_from("<fi", raw, at)
            scores.append(score)
            pieces.append(raw[at + 8 : at + 8 + length])
            at += 8 + length
        return cls(scores, pieces)

    def encode(self, text: str) -> list[int]:
        """Tokens with <s> before them: characters, or bytes where a character is no token, merged pair by pair."""
        index = {piece: token for token, piece in enumerate(self.pieces)}
        tokens: list[int] = [index[b" "]] if text else []
        for character in text:
            raw = character.encode()
            tokens += [index[raw]] if raw in index else [byte + 3 for byte in raw]
        while True:
            best: tuple[float, int, int] | None = None
            for position in range(len(tokens) - 1):
                merged = index.get(self.pieces[tokens[position]] + self.pieces[tokens[position + 1]])
                if merged is not None and (best is None or self.scores[merged] > best[0]):
                    best = (self.scores[merged], position, merged)
            if best is None:
                return [BOS, *tokens]
            tokens[best[1] : best[1] + 2] = [best[2]]

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens that follow <s>: the space before the first is dropped."""
        raw = b"".join(bytes([token - 3]) if 3 <= token < 259 else self.pieces[token] for token in tokens)
        return raw.removeprefix(b" ").decode("utf-8", "replace")


def convert(checkpoint: Path, folder: Path) -> Header:
    """Writes the Hugging Face layout; its tokenizer.json is a placeholder that knows the ids alone."""
    header, tensors = read_checkpoint(checkpoint)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": header.dim,
        "intermediate_size": header.hidden,
        "num_hidden_layers": header.layers,
        "num_attention_heads": header.heads,
        "num_key_value_heads": header.kv_heads,
        "vocab_size": header.vocab,
        "max_position_embeddings": header.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": BOS,  # llama2.c's run ends at <s>: stories follow each other with it between them
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"<{token}>": token for token in range(header.vocab)}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "<0>"}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return header
