"""Shapes of real models, and Hugging Face checkpoints of those shapes with random weights.

Speed depends on shapes and not on trained weights, so a benchmark needs no download. The weights are random points of an int4
grid that every engine's quantizer recovers exactly (blocks of 32, with each block's extreme on code -8). So all engines run the
same model even after quantization, and their logits can be compared.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

BLOCK = 32  # elements per scale of the int4 grid
SCALES = np.array([-1.5, -1.25, -1.0, 1.0, 1.25, 1.5], np.float32)  # in weight units; exact in fp16 after any code
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
DEVIATION = 5.0  # of the weights that draw_tensor draws, in weight units
# Norm of an adapter's change over the weight's. Trained adapters are far smaller, but they act in the inputs' directions. Random
# ones act on random inputs no more than rounding noise does (7% of a weight); at this size they exceed it as trained ones do.
ADAPTER_SIZE = 0.5
FIRST_FREE_TOKEN = 258  # 256 bytes, then bos and eos


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretched rotary frequencies, as `config.json` states them."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Shape:
    """The sizes of one Llama-architecture model with tied embeddings."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    weight_unit: float = 2.0**-8  # gives a standard deviation of 0.02, Hugging Face's initialization

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each tensor's Hugging Face name and shape, in file order."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.self_attn.q_proj.weight", (queries, self.hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (keys, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (keys, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, queries)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{prefix}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3.2-1b", 2048, 16, 32, 8, 64, 8192, 128256, 131072, 500000.0, RopeScaling(32.0)),
        Shape("llama-3.2-3b", 3072, 28, 24, 8, 128, 8192, 128256, 131072, 500000.0, RopeScaling(32.0)),
        Shape("llama-3.1-8b", 4096, 32, 32, 8, 128, 14336, 128256, 131072, 500000.0, RopeScaling(8.0)),
        Shape("smollm2-135m", 576, 30, 9, 3, 64, 1536, 49152, 8192, 100000.0),
        # Small shapes to verify that every engine runs the same model: large weights, so that attention and rotary positions
        # determine the logits; widths that are and are not multiples of 256 (llama.cpp's k-quants).
        Shape("tiny-llama3", 512, 2, 8, 2, 64, 1024, 2048, 4096, 500000.0, RopeScaling(32.0, 1.0, 4.0, 64), 2.0**-6),
        Shape("tiny-smol", 576, 2, 9, 3, 64, 1536, 2048, 2048, 100000.0, None, 2.0**-6),
    )
}


def random_prompt(shape: Shape, length: int, seed: int = 0) -> list[int]:
    """Token ids drawn uniformly from the vocabulary without its special tokens."""
    generator = np.random.default_rng(seed)
    return [int(token) for token in generator.integers(FIRST_FREE_TOKEN, shape.vocab, length)]


def make_config(shape: Shape) -> dict[str, object]:
    """The `config.json` of a shape."""
    scaling = None
    if shape.rope_scaling is not None:
        scaling = {"rope_type": "llama3"} | vars(shape.rope_scaling)
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": scaling,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def draw_tensor(shape: Shape, name: str, size: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yields one tensor in runs of fp16 values.

    Each tensor has its own seed, so the order of tensors does not matter.
    """
    generator = np.random.default_rng(zlib.crc32(f"{shape.name}/{name}".encode()))
    left, run = int(np.prod(size)), 1 << 22
    if len(size) == 1:  # a norm's weight: around one
        yield (1 + 0.1 * generator.standard_normal(left)).astype("<f2")
        return
    while left:
        blocks = min(run, left) // BLOCK
        codes = generator.integers(-7, 8, (blocks, BLOCK), np.int8)
        codes[:, 0] = -8
        scales = SCALES[generator.integers(len(SCALES), size=(blocks, 1))] * np.float32(shape.weight_unit)
        yield (codes * scales).astype("<f2")
        left -= codes.size


def write_weights(shape: Shape, path: Path) -> None:
    """Writes the safetensors file run by run. No whole tensor is in memory.

    Format: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in shape.tensors():
        end = offset + 2 * int(np.prod(size))
        header[name] = {"dtype": "F16", "shape": size, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, size in shape.tensors():
            for values in draw_tensor(shape, name, size):
                file.write(values.tobytes())


def make_tokenizer(shape: Shape) -> dict[str, object]:
    """A `tokenizer.json` of bytes, two special tokens, and made-up words for all other ids."""
    # GPT-2's printable stand-ins:
    # https://github.com/openai/gpt-2/blob/9b63575ef42771a015060c964af2c3da4cf7c8ab/src/encoder.py#L9
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    tokens = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    tokens += [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *(f"Ġw{token}" for token in range(FIRST_FREE_TOKEN, shape.vocab)),
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 256, "content": tokens[256]} | flags,
            {"id": 257, "content": tokens[257]} | flags,
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: index for index, token in enumerate(tokens)}, "merges": []},
    }


def write_checkpoint(shape: Shape, cache: Path) -> Path:
    """Returns the folder of a checkpoint of this shape under `cache`.

    Writes it if it is missing.
    """
    folder = cache / "checkpoint"
    if folder.exists():
        return folder
    draft = cache / "checkpoint.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write_weights(shape, draft / "model.safetensors")
    files = {
        "config.json": make_config(shape),
        "generation_config.json": {"bos_token_id": 256, "eos_token_id": 257, "do_sample": False},
        "tokenizer.json": make_tokenizer(shape),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "model_max_length": shape.max_positions,
        },
    }
    for name, content in files.items():
        (draft / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    draft.rename(folder)
    return folder


def write_adapter(shape: Shape, checkpoint: Path, folder: Path, modules: Sequence[str], *, rank: int, seed: int) -> Path:
    """Writes a random fp16 LoRA adapter in PEFT's format, if it is missing.

    It is on these modules of every layer. Its change of a weight, 2 * B @ A, has ADAPTER_SIZE times the weight's norm.
    """
    if folder.exists():
        return folder
    generator = np.random.default_rng(seed)
    deviation = math.sqrt(ADAPTER_SIZE * DEVIATION * shape.weight_unit / (2 * math.sqrt(rank)))
    tensors = {}
    for name, size in shape.tensors():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in modules:
            for factor, (rows, columns) in {"A": (rank, size[1]), "B": (size[0], rank)}.items():
                values = deviation * generator.standard_normal((rows, columns))
                tensors[f"base_model.model.{module}.lora_{factor}.weight"] = values.astype(np.float16)
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    config = {
        "base_model_name_or_path": str(checkpoint),
        "bias": "none",
        "lora_alpha": 2 * rank,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(modules),
        "task_type": "CAUSAL_LM",
    }
    (draft / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(tensors, draft / "adapter_model.safetensors")
    return draft.rename(folder)


def write_texts(shape: Shape, path: Path, count: int, words: int = 512) -> Path:
    """Writes calibration texts of made-up words, one token each, as JSON lines."""
    lines = (json.dumps({"text": " ".join(f"w{id_}" for id_ in random_prompt(shape, words, seed))}) for seed in range(count))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
