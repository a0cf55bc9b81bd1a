"""Writes a folder that transformers saved as a GGUF file, as llama.cpp's convert_hf_to_gguf.py does, with the gguf package."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, RopeScalingType, TokenType, get_tensor_name_map
from gguf.quants import quantize
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

PERMUTED = ("granite", "llama", "smollm3")


def write_gguf(
    folder: Path,
    path: Path,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    vocabulary: Callable[[GGUFWriter, Path], None] | None = None,
    change: Callable[[GGUFWriter], None] = lambda writer: None,
    **options: Any,
) -> Path:
    """Writes one file.

    kind: of every matrix whose rows it can hold; all else is F32. vocabulary: adds the tokenizer, by default the folder's
    byte-level one. change: adds more. options: of GGUFWriter.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = {"gemma3_text": "gemma3", "mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = GGUFWriter(path, architecture, **options)
    _add_settings(writer, config, architecture)
    (vocabulary or add_byte_level)(writer, folder)
    _add_tensors(writer, config, architecture, load_file(folder / "model.safetensors"), kind)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """LlamaModel.permute of the converter: the halves of each head, interleaved."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def add_byte_level(writer: GGUFWriter, folder: Path, pre: str = "gpt-2") -> None:
    """Adds a byte-level vocabulary from a tokenizer.json, and the chat template beside it."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    special = {token["content"]: token["special"] for token in tokenizer["added_tokens"]}
    kinds = {True: TokenType.CONTROL, False: TokenType.USER_DEFINED, None: TokenType.NORMAL}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[special.get(token)] for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]])
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for role, add in (("bos_token", writer.add_bos_token_id), ("eos_token", writer.add_eos_token_id)):
        if config.get(role) is not None:
            add(vocabulary[config[role]])
    if (folder / "chat_template.jinja").is_file():
        writer.add_chat_template((folder / "chat_template.jinja").read_text(encoding="utf-8"))


def _add_settings(writer: GGUFWriter, config: Mapping[str, Any], architecture: str) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim"):
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
    ropes = config["rope_parameters"]
    rope = ropes.get("full_attention", ropes)
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, head_size))
    if architecture == "phi3":
        _add_phi3(writer, config, rope, head_size)
    if architecture.startswith("gemma"):
        _add_gemma(writer, config, architecture)
    if architecture == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])


def _add_phi3(writer: GGUFWriter, config: Mapping[str, Any], rope: Mapping[str, Any], head_size: int) -> None:
    writer.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_sliding_window(config.get("sliding_window") or 0)
    original, longest = config["original_max_position_embeddings"], config["max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(original)
    if rope["rope_type"] == "longrope":
        scale = longest / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))


def _add_gemma(writer: GGUFWriter, config: Mapping[str, Any], architecture: str) -> None:
    writer.add_sliding_window(config["sliding_window"])
    if architecture == "gemma3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def llama3_divisors(rope: Mapping[str, Any], head_size: int) -> NDArray[np.float32]:
    """The divisor of each frequency, as LlamaModel.generate_extra_tensors of the converter writes them."""
    divisors = []
    for index in range(0, head_size, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / head_size)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def _add_tensors(
    writer: GGUFWriter,
    config: Mapping[str, Any],
    architecture: str,
    tensors: Mapping[str, NDArray[Any]],
    kind: GGMLQuantizationType,
) -> None:
    (number,) = [number for number, name in MODEL_ARCH_NAMES.items() if name == architecture]
    names = get_tensor_name_map(number, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, values in sorted(tensors.items()):
        module, _, suffix = name.rpartition(".")
        last = module.rpartition(".")[2]
        if architecture in PERMUTED and last in heads:
            values = permute(values, heads[last])
        if architecture.startswith("gemma") and last.endswith("norm"):
            values = values + np.float32(1)
        found = names.get_name(module)
        assert found is not None, name
        add_tensor(writer, f"{found}.{suffix}", values, kind)


def add_tensor(writer: GGUFWriter, name: str, values: NDArray[Any], kind: GGMLQuantizationType) -> None:
    """Adds a tensor, in float32 if it is a vector."""
    if values.ndim < 2 or kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, values.astype(np.float32))
    else:
        writer.add_tensor(name, quantize(values.astype(np.float32), kind), raw_dtype=kind)


def add_sentencepiece(
    writer: GGUFWriter, tokens: Sequence[tuple[str, float, TokenType]], *, prefix: bool, bos: int = 1, eos: int = 2
) -> None:
    """Adds a SentencePiece vocabulary of (token, score, type)."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(prefix)
