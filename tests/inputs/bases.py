"""Bases that people bring: types, shards, indices, heads, multimodal models, and every kind of model that is no base."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from edgelora_export.base.base import Base
from edgelora_export.traced.optimum import trace_decoder
from edgelora_export.weights.torch_model import load_model
from edgelora_runtime import Runtime
from edgelora_runtime.errors import InputError
from tests.inputs.cases import Case
from tests.multimodal import make_wrapper
from tests.tiny import export_base, load_base, make_adapter, make_base, random_tokens, torch_logits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Floats = np.ndarray[Any, np.dtype[np.float32]]

TOKENS = random_tokens(40)
TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7}


def compare(folder: Path, expected: Floats) -> str:
    """Compares logits of transformers with those of the float32 bundle, and of the base as search and training load it."""
    assert expected.std() > 0.1, "logits that hardly differ would make any comparison pass"
    size = float(np.abs(expected).max())
    in_torch = np.abs(torch_logits(load_model(Base.open(folder)), TOKENS) - expected).max() / size
    export_base(folder, folder.parent / "bundle")
    with Runtime(folder.parent / "bundle", threads=1) as runtime:
        apart = np.abs(runtime.logits(TOKENS) - expected).max() / size
    assert max(apart, in_torch) <= 1e-5
    return f"equal to {max(apart, in_torch):.0e} of the largest logit"


def refuse(folder: Path, *mentions: str) -> str:
    """The one line that refuses a base."""
    try:
        Base.find(str(folder))
    except InputError as error:
        line = str(error)
    else:
        raise AssertionError("the base is taken")
    assert all(mention in line for mention in mentions), line
    return line


def stored_as(dtype: torch.dtype) -> Callable[[Path], str]:
    def check(folder: Path) -> str:
        make_base(folder / "base").to(dtype).save_pretrained(folder / "base")
        return compare(folder / "base", torch_logits(load_base(folder / "base"), TOKENS))

    return check


def of_settings(**settings: Any) -> Callable[[Path], str]:
    def check(folder: Path) -> str:
        return compare(folder / "base", torch_logits(make_base(folder / "base", **settings), TOKENS))

    return check


def of_wrapper(name: str) -> Callable[[Path], str]:
    def check(folder: Path) -> str:
        return compare(folder / "base", torch_logits(make_wrapper(folder / "base", name), TOKENS))

    return check


def of_other_class(name: str, config: Any, *mentions: str) -> Callable[[Path], str]:
    """Saves a model of another class, which Base must refuse before it reads a weight."""

    def check(folder: Path) -> str:
        untyped: Any = getattr(transformers, name)
        untyped(config).save_pretrained(folder / "base")
        return refuse(folder / "base", name, *mentions)

    return check


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def shard(folder: Path) -> dict[str, Any]:
    """Saves a base in shards, and returns its index."""
    make_base(folder).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    index: dict[str, Any] = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def check_shards(folder: Path) -> str:
    assert len(set(shard(folder / "base")["weight_map"].values())) > 1
    return compare(folder / "base", torch_logits(load_base(folder / "base"), TOKENS))


def check_stale_index(folder: Path) -> str:
    shard(folder / "base")
    make_base(folder / "base", seed=5)
    return compare(folder / "base", torch_logits(load_base(folder / "base"), TOKENS))


def check_index_outside(folder: Path) -> str:
    index = shard(folder / "base")
    (folder / "base" / "model-00001-of-00001.safetensors").unlink(missing_ok=True)
    first = sorted(set(index["weight_map"].values()))[0]
    shutil.move(folder / "base" / first, folder / first)
    for outside in (f"../{first}", str(folder / first), f"sub/{first}", f"..\\{first}"):
        moved = {name: outside if file == first else file for name, file in index["weight_map"].items()}
        write_index(folder / "base", {**index, "weight_map": moved})
        line = refuse(folder / "base", "no safetensors file of this folder")
    return line


def check_broken_index(folder: Path) -> str:
    shard(folder / "base")
    for broken in (["a"], {"a": 1}, {}, "a", None):
        write_index(folder / "base", {"weight_map": broken})
        line = refuse(folder / "base", "weight_map must be an object")
    return line


def check_lost_tensor(folder: Path) -> str:
    file = folder / "base" / shard(folder / "base")["weight_map"]["model.norm.weight"]
    tensors = load_file(file)
    tensors.pop("model.norm.weight")
    save_file(tensors, file, {"format": "pt"})
    return refuse(folder / "base", "lacks model.norm.weight, which model.safetensors.index.json names")


def check_truncated(folder: Path) -> str:
    make_base(folder / "base")
    path = folder / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return refuse(folder / "base", "not a readable safetensors file", "download it again")


def check_other_sizes(folder: Path) -> str:
    make_base(folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
    (folder / "base" / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}), encoding="utf-8")
    return refuse(folder / "base", "up_proj.weight is (96, 64), not (100, 64)")


def tied_with_head(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], str]:
    def check(folder: Path) -> str:
        make_base(folder / "base", tie_word_embeddings=True)
        change_tensors(folder / "base", change)
        return compare(folder / "base", torch_logits(load_base(folder / "base"), TOKENS))

    return check


def add_other_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()


def add_equal_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def move_to_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def check_missing_head(folder: Path) -> str:
    make_base(folder / "base")
    change_tensors(folder / "base", lambda tensors: tensors.pop("lm_head.weight"))
    return refuse(folder / "base", "has no lm_head.weight")


def check_bare_names(folder: Path) -> str:
    make_base(folder / "base", tie_word_embeddings=True)
    tensors = load_file(folder / "base" / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "base" / "model.safetensors", {"format": "pt"})
    return refuse(folder / "base", "embed_tokens.weight for model.embed_tokens.weight", "embedding models")


def check_pickles(folder: Path) -> str:
    model = make_base(folder / "base")
    (folder / "base" / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "base" / "pytorch_model.bin")
    return refuse(folder / "base", "pytorch_model.bin", "save_pretrained")


def check_adapter(folder: Path) -> str:
    make_base(folder / "base")
    make_adapter(folder / "base", folder / "adapter")
    return refuse(folder / "adapter", "is an adapter", str(folder / "base"))


def check_adapter_beside(folder: Path) -> str:
    make_base(folder / "base")
    make_adapter(folder / "base", folder / "base")
    return refuse(folder / "base", "adapter_config.json", "move one of them")


def check_gguf_folder(folder: Path) -> str:
    (folder / "base").mkdir()
    (folder / "base" / "tiny-q4.gguf").write_bytes(b"GGUF")
    return refuse(folder / "base", "tiny-q4.gguf", "give the path")


def check_unknown_type(folder: Path) -> str:
    make_base(folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
    changed = {**config, "model_type": "abacus", "architectures": ["AbacusForCausalLM"], "auto_map": {"AutoModel": "a.B"}}
    (folder / "base" / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    return refuse(folder / "base", "'abacus'", "auto_map")


def check_empty(folder: Path) -> str:
    (folder / "base").mkdir()
    return refuse(folder / "base", "config.json does not exist")


def check_no_type(folder: Path) -> str:
    make_base(folder / "base")
    (folder / "base" / "config.json").write_text('{"hidden_size": 64}', encoding="utf-8")
    return refuse(folder / "base", "no model_type")


def check_mamba(folder: Path) -> str:
    untyped: Any = transformers.MambaForCausalLM
    untyped(transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1)).save_pretrained(folder / "base")
    base = Base.open(folder / "base")
    try:
        with trace_decoder(base):
            raise AssertionError("a Mamba is traced")
    except InputError as error:
        assert "'mamba'" in str(error)
        return str(error)


BERT = transformers.BertConfig(**TINY)
T5 = transformers.T5Config(vocab_size=300, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
WHISPER = transformers.WhisperConfig(
    vocab_size=300, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
)
WHISPER.update({"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0})
LLAMA = transformers.LlamaConfig(**TINY | {"num_labels": 3, "pad_token_id": 0})
VIT = transformers.ViTConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=28, patch_size=14
)
PALIGEMMA = transformers.PaliGemmaConfig(
    text_config={**TINY, "model_type": "gemma", "head_dim": 16, "num_key_value_heads": 1},
    vision_config={**TINY, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
    projection_dim=32,
)

CASES = [
    Case("folder in float32", "base", "its logits", "equal", stored_as(torch.float32)),
    Case("folder in bfloat16", "base", "its logits, computed in float32", "equal", stored_as(torch.bfloat16)),
    Case("folder in float16", "base", "its logits, computed in float32", "equal", stored_as(torch.float16)),
    Case("shards with an index", "base", "its logits", "equal", check_shards),
    Case("model.safetensors beside an old index", "base", "reads model.safetensors", "equal", check_stale_index),
    Case("index that names a file outside of the folder", "base", "opens that file", "refused", check_index_outside),
    Case("index whose weight_map is no object of names", "base", "AttributeError", "refused", check_broken_index),
    Case("index that names a tensor that its shard lacks", "base", "a random tensor", "refused", check_lost_tensor),
    Case("safetensors cut short", "base", "SafetensorError", "refused", check_truncated),
    Case("sizes in config.json that the tensors contradict", "base", "RuntimeError", "refused", check_other_sizes),
    Case("head beside tie_word_embeddings, another matrix", "base", "keeps both", "equal", tied_with_head(add_other_head)),
    Case("head beside tie_word_embeddings, the same matrix", "base", "ties them", "equal", tied_with_head(add_equal_head)),
    Case("head alone, with tie_word_embeddings", "base", "embeds with the head", "equal", tied_with_head(move_to_head)),
    Case("no head and no tie_word_embeddings", "base", "a random head", "refused", check_missing_head),
    Case("tensors of an embedding model", "base", "ties a head to it", "refused", check_bare_names),
    Case("Llama with yarn", "base", "its logits", "equal", of_settings(rope_parameters=YARN)),
    Case("Gemma 3 with vision", "base", "its logits on text", "equal", of_wrapper("gemma3")),
    Case("Ministral 3 with vision", "base", "its logits on text", "equal", of_wrapper("mistral3 of ministral3")),
    Case("Mistral Small 3.1 with vision", "base", "its logits on text", "equal", of_wrapper("mistral3 of mistral")),
    Case("Qwen3-VL", "base", "its logits on text", "equal", of_wrapper("qwen3_vl")),
    Case("Qwen2.5-VL", "base", "its logits on text", "equal", of_wrapper("qwen2_5_vl")),
    Case("LLaVA", "base", "its logits on text", "equal", of_wrapper("llava")),
    Case(
        "PaliGemma",
        "base",
        "attends both ways over the prompt",
        "refused",
        of_other_class("PaliGemmaForConditionalGeneration", PALIGEMMA, "multimodal"),
    ),
    Case("BERT", "base", "fills in words", "refused", of_other_class("BertForMaskedLM", BERT, "an encoder")),
    Case("T5", "base", "translates", "refused", of_other_class("T5ForConditionalGeneration", T5, "sequence-to-sequence")),
    Case("Whisper", "base", "transcribes", "refused", of_other_class("WhisperForConditionalGeneration", WHISPER)),
    Case("ViT", "base", "classifies images", "refused", of_other_class("ViTForImageClassification", VIT, "a classifier")),
    Case(
        "Llama without a head", "base", "a random head", "refused", of_other_class("LlamaModel", LLAMA, "without a language head")
    ),
    Case(
        "Llama that classifies",
        "base",
        "gives labels",
        "refused",
        of_other_class("LlamaForSequenceClassification", LLAMA, "a classifier"),
    ),
    Case("Mamba", "base", "its logits", "refused", check_mamba),
    Case("pickled weights", "base", "unpickles them", "refused", check_pickles),
    Case("adapter as a base", "base", "loads its base with the adapter", "refused", check_adapter),
    Case("adapter beside a model", "base", "loads the adapter too", "refused", check_adapter_beside),
    Case("folder of GGUF files", "base", "ValueError", "refused", check_gguf_folder),
    Case("type that nobody knows", "base", "ValueError", "refused", check_unknown_type),
    Case("empty folder", "base", "ValueError", "refused", check_empty),
    Case("config.json without model_type", "base", "ValueError", "refused", check_no_type),
]
