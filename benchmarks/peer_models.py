"""Makes the peers' models from one Hugging Face checkpoint, with the peers' own tools.

It runs in the peers' environment (peers.txt), so it imports nothing from edgelora.

    python -m benchmarks.peer_models genai CHECKPOINT FOLDER
    python -m benchmarks.peer_models gguf CHECKPOINT FILE.gguf [--type q4_0|q4_0-pure] [--vocabulary OTHER.gguf]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

# The builder's fastest options that do not change what is computed. `shared_embeddings` (one int4 table for the embedding and
# the head) and `prune_lm_head` (the head on the last position only) are not defaults. Block 32, accuracy level 4 and one product
# for Q, K and V are its defaults on a CPU.
GENAI_OPTIONS = ["block_size=32", "accuracy_level=4", "shared_embeddings=true", "prune_lm_head=true"]


def build_genai(checkpoint: Path, folder: Path) -> None:
    """Builds onnxruntime-genai's model with its own builder."""
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(draft)]
        command += ["-p", "int4", "-e", "cpu", "-c", scratch, "--extra_options", *GENAI_OPTIONS]
        subprocess.run(command, check=True, stdout=sys.stderr)
    draft.rename(folder)


def permute_rotary_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders Q or K rows from halves to neighbouring pairs, per head.

    Halves are Hugging Face's order, pairs that of GGUF's `llama`. Source: `LlamaModel.permute` of llama.cpp's
    convert_hf_to_gguf.py.
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def rotary_divisors(config: dict[str, Any]) -> np.ndarray | None:
    """Computes Llama 3's divisor of each rotary frequency, float32 (head_dim / 2,).

    Returns None without scaling. Source: `LlamaModel.generate_extra_tensors` of llama.cpp's convert_hf_to_gguf.py.
    """
    scaling = config.get("rope_scaling")
    if not scaling:
        return None
    size = config["head_dim"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    trained = scaling["original_max_position_embeddings"]
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(0, size, 2) / size)
    smooth = (trained / wavelengths - low) / (high - low)
    divisors: np.ndarray = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    divisors[wavelengths < trained / high] = 1
    divisors[wavelengths > trained / low] = scaling["factor"]
    return divisors.astype(np.float32)


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Maps an fp16 safetensors file lazily: name → array."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: np.memmap(path, "<f2", "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
        for name, entry in header.items()
    }


GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def name_gguf(name: str) -> str:
    """A tensor's GGUF name, from its Hugging Face name."""
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[rest]}"


def copy_vocabulary(writer: Any, donor: Path, size: int) -> None:
    """Copies the tokenizer of another GGUF file. Its vocabulary is filled with made-up words up to the size."""
    import gguf

    for name, field in gguf.GGUFReader(donor).fields.items():
        if not name.startswith("tokenizer."):
            continue
        value = field.contents()
        if name == gguf.Keys.Tokenizer.LIST:
            value += [f"w{token}" for token in range(len(value), size)]
        elif name == gguf.Keys.Tokenizer.TOKEN_TYPE:
            value += [int(gguf.TokenType.NORMAL)] * (size - len(value))
        writer.add_key_value(name, value, field.types[0], field.types[1] if len(field.types) > 1 else None)


def write_float_gguf(checkpoint: Path, path: Path, vocabulary: Path | None = None) -> None:
    """Converts a checkpoint with tied embeddings to an fp16 GGUF file, with the vocabulary of another file or none."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        copy_vocabulary(writer, vocabulary, config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    divisors = rotary_divisors(config)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    for name, weight in map_safetensors(checkpoint / "model.safetensors").items():
        if ".q_proj." in name:
            weight = permute_rotary_rows(weight, config["num_attention_heads"])
        elif ".k_proj." in name:
            weight = permute_rotary_rows(weight, config["num_key_value_heads"])
        writer.add_tensor(name_gguf(name), weight if weight.ndim > 1 else weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build_gguf(checkpoint: Path, path: Path, *, pure: bool, vocabulary: Path | None = None) -> None:
    """Builds llama.cpp's model with the library function that `llama-quantize` calls.

    Without `pure` the result is that of `llama-quantize FILE Q4_0`: Q4_0 matrices, with the tied embedding, which is also the
    head, in Q6_K (Q8_0 if the width is not a multiple of 256). With `pure`, as with `--pure`, the embedding is Q4_0 too: the
    same number of bytes that edgelora and onnxruntime-genai read.
    """
    import llama_cpp

    plain, draft = path.with_name(path.name + ".f16"), path.with_name(path.name + ".draft")
    write_float_gguf(checkpoint, plain, vocabulary)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    options.pure = pure
    status = llama_cpp.llama_model_quantize(str(plain).encode(), str(draft).encode(), ctypes.byref(options))
    plain.unlink()
    if status != 0:
        raise RuntimeError(f"llama_model_quantize returned {status} for {path}")
    draft.rename(path)


def main() -> None:
    """Builds the model that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    genai, gguf = verbs.add_parser("genai"), verbs.add_parser("gguf")
    gguf.add_argument("--type", choices=["q4_0", "q4_0-pure"], default="q4_0")
    gguf.add_argument("--vocabulary", type=Path, help="a GGUF file whose tokenizer the model gets; none if omitted")
    for verb in (genai, gguf):
        verb.add_argument("checkpoint", type=Path)
        verb.add_argument("output", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "genai":
        build_genai(arguments.checkpoint, arguments.output)
    else:
        pure = arguments.type == "q4_0-pure"
        build_gguf(arguments.checkpoint, arguments.output, pure=pure, vocabulary=arguments.vocabulary)


if __name__ == "__main__":
    main()
