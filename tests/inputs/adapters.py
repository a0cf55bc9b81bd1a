"""Adapters as PEFT, torch.compile, DDP, multimodal wrappers, mlx-lm and llama.cpp write them. The reference is PEFT's merge."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from edgelora.adapters.checks import check_shapes
from edgelora.adapters.folder import CONFIG, WEIGHTS, Adapter
from edgelora.mix.mix import Mix
from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_runtime.errors import InputError
from tests.inputs.cases import Case
from tests.tiny import LINEARS, load_base, make_base

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Tensors = dict[str, torch.Tensor]

HEADS = {"q_proj": 4, "k_proj": 2}  # of tests.tiny.make_base


def train(base: Path, folder: Path, *, resize: int | None = None, **settings: Any) -> None:
    """Saves an adapter by PEFT whose trained values all differ from their initialization."""
    torch.manual_seed(5)
    model = load_base(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on tied and resized embeddings
        if resize is not None:
            model.resize_token_embeddings(resize)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM", **settings})
        model = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(str(folder))


def merge_by_peft(base: Path, folder: Path, resize: int | None = None) -> Tensors:
    """The weights of PEFT's merged model."""
    model = load_base(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if resize is not None:
            model.resize_token_embeddings(resize)
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}


def resize_rows(weight: Floats, rows: int | None) -> Floats:
    """A vocabulary matrix cut to a number of rows, or padded with zeros."""
    if rows is None or rows == len(weight):
        return weight
    return np.concatenate([weight[:rows], np.zeros((max(0, rows - len(weight)), weight.shape[1]), np.float32)])


def compare(base_folder: Path, adapter: Adapter | Mix, theirs: Mapping[str, torch.Tensor]) -> str:
    """Asserts that base and change are PEFT's merged weights, tensor by tensor, and that the change is visible."""
    base, largest, changed = Base.open(base_folder), 0.0, set()
    for name, expected in theirs.items():
        if name not in base:
            assert name == "lm_head.weight", name  # a tied head, which the checkpoint does not store
            continue
        module, part = name.rsplit(".", 1)
        ours = before = base.tensor(name)
        if part == "weight" and module in ("model.embed_tokens", "lm_head"):
            ours = before = resize_rows(before, adapter.vocab_size)
        if part == "weight" and module in adapter.modules:
            ours = before + adapter.dense(module, before)
        elif part == "bias" and module in adapter.biased:
            ours = before + adapter.bias(module, before)
        assert ours.shape == tuple(expected.shape), name
        largest = max(largest, float(np.abs(ours - expected.numpy()).max()))
        if ours.shape != base.tensor(name).shape or np.abs(ours - before).max() > 1e-3:
            changed.add(module)
    assert changed == adapter.modules | (adapter.biased - adapter.modules)
    assert largest <= 1e-5
    return f"equal to {largest:.0e}"


def as_peft(
    settings: Mapping[str, Any], model: Mapping[str, Any] | None = None, resize: int | None = None
) -> Callable[[Path], str]:
    """A check of an adapter that PEFT made with these settings."""

    def check(folder: Path) -> str:
        make_base(folder / "base", **(model or {}))
        train(folder / "base", folder / "a", resize=resize, **settings)
        return compare(folder / "base", Adapter.open(folder / "a"), merge_by_peft(folder / "base", folder / "a", resize))

    return check


def renamed(rename: Callable[[str], str], dtype: torch.dtype = torch.float32, **settings: Any) -> Callable[[Path], str]:
    """A check of an adapter whose keys another writer spells in another way."""

    def check(folder: Path) -> str:
        make_base(folder / "base")
        train(folder / "base", folder / "a", **settings)
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / "a" / WEIGHTS).items()}
        save_file(tensors, folder / "a" / WEIGHTS)
        theirs = merge_by_peft(folder / "base", folder / "a")
        save_file({rename(key): tensor for key, tensor in tensors.items()}, folder / "a" / WEIGHTS)
        return compare(folder / "base", Adapter.open(folder / "a"), theirs)

    return check


def insert_adapter_name(key: str) -> str:
    return re.sub(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\b", r".\1.default", key)


def check_one_of_each_wrapper(folder: Path) -> str:
    """A mix of an adapter of the text model and one of a multimodal wrapper changes each module once, by both."""
    make_base(folder / "base")
    for name in ("a", "b"):
        train(folder / "base", folder / name)
    theirs = merge_by_peft(folder / "base", folder / "a")
    wrapped = {
        key.replace("model.layers", "model.language_model.layers"): t for key, t in load_file(folder / "b" / WEIGHTS).items()
    }
    save_file(wrapped, folder / "b" / WEIGHTS)
    mix = Mix({name: Adapter.open(folder / name) for name in ("a", "b")}, {"a": 0.25, "b": 0.75})
    return compare(folder / "base", mix, theirs)


def check_multimodal(folder: Path) -> str:
    """PEFT's adapter of a Gemma 3 with a vision tower, on the text model of the same weights."""
    from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "model_type": "gemma3_text",
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    any_config: Any = Gemma3Config
    whole = Gemma3ForConditionalGeneration(
        any_config(text_config=text, vision_config={**vision, "patch_size": 14}, mm_tokens_per_image=4)
    )
    text_class: Any = Gemma3ForCausalLM
    alone = text_class(whole.config.text_config)
    alone.load_state_dict(
        {
            name.replace("model.language_model.", "model."): t
            for name, t in whole.state_dict().items()
            if "language_model" in name
        },
        strict=False,
    )
    alone.save_pretrained(folder / "base")
    torch.manual_seed(5)
    model = get_peft_model(whole, LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|up_proj)"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(str(folder / "a"))
    merged = model.merge_and_unload().state_dict()
    theirs = {name.replace("model.language_model.", "model."): t for name, t in merged.items() if "language_model" in name}
    return compare(folder / "base", Adapter.open(folder / "a"), theirs)


def write_mlx(folder: Path, target: Path, kind: str, layers: int) -> None:
    """Lays PEFT's adapter of the last layers out as mlx-lm does: transposed, with the scale instead of α."""
    tensors = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        name = key.removeprefix("base_model.model.").replace(".lora_magnitude_vector", ".m")
        name = re.sub(r"lora_([AB])\.weight", lambda found: f"lora_{found[1].lower()}", name)
        tensors[name] = tensor.T.contiguous() if tensor.dim() == 2 else tensor
    target.mkdir()
    save_file(tensors, target / "adapters.safetensors")
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters, "model": "mlx-community/tiny"}
    (target / CONFIG).write_text(json.dumps(config))


def as_mlx(kind: str) -> Callable[[Path], str]:
    """A check of PEFT's adapter of the last layer in mlx-lm's layout."""

    def check(folder: Path) -> str:
        make_base(folder / "base")
        train(folder / "base", folder / "peft", layers_to_transform=[1], use_dora=kind == "dora")
        write_mlx(folder / "peft", folder / "mlx", kind, layers=1)
        adapter = Adapter.open(folder / "mlx")
        assert adapter.notes == ()
        return compare(folder / "base", adapter, merge_by_peft(folder / "base", folder / "peft"))

    return check


def write_gguf(folder: Path, target: Path) -> None:
    """Writes a PEFT adapter as llama.cpp's convert_lora_to_gguf.py does.

    The rows of queries and keys are in pairs of neighbours, not in halves of a head: row h·d + 2i + s has row h·d + s·d/2 + i.
    """
    import gguf

    parts = {
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_output",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }
    writer: Any = gguf.GGUFWriter(target, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(json.loads((folder / CONFIG).read_text())["lora_alpha"]))
    for key, tensor in load_file(folder / WEIGHTS).items():
        found = re.fullmatch(r".*layers\.(\d+)\.\w+\.(\w+)_proj\.lora_([AB])\.weight", key)
        assert found is not None
        layer, name, side = found.groups()
        values = tensor.numpy()
        if side == "B" and name in ("q", "k"):
            size = len(values) // HEADS[f"{name}_proj"]
            order = [
                head * size + half * size // 2 + index
                for head in range(HEADS[f"{name}_proj"])
                for index in range(size // 2)
                for half in (0, 1)
            ]
            values = values[order]
        writer.add_tensor(f"blk.{layer}.{parts[name]}.weight.lora_{side.lower()}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_gguf(folder: Path) -> str:
    make_base(folder / "base")
    train(folder / "base", folder / "peft")
    write_gguf(folder / "peft", folder / "a.gguf")
    adapter = Adapter.open(folder / "a.gguf", base=Base.open(folder / "base").config)
    return compare(folder / "base", adapter, merge_by_peft(folder / "base", folder / "peft"))


def check_written_gguf(folder: Path) -> str:
    """What edgelora writes for llama.cpp is what llama.cpp's own script writes of the same adapter."""
    import gguf

    from edgelora.composing.compose import compose

    make_base(folder / "base")
    train(folder / "base", folder / "peft")
    write_gguf(folder / "peft", folder / "theirs.gguf")
    compose({"a": (folder / "peft", 1.0)}, folder / "ours.gguf")
    found = [gguf.GGUFReader(folder / name) for name in ("ours.gguf", "theirs.gguf")]
    alphas = [reader.fields["adapter.lora.alpha"].contents() for reader in found]
    ours, theirs = ({tensor.name: tensor.data for tensor in reader.tensors} for reader in found)
    assert ours.keys() == theirs.keys()
    names = [name.removesuffix(".lora_a") for name in ours if name.endswith(".lora_a")]
    products = [
        [each[f"{name}.lora_b"] @ each[f"{name}.lora_a"] * alpha / 4 for name in names]
        for each, alpha in zip((ours, theirs), alphas, strict=True)
    ]
    largest = max(float(np.abs(one - other).max()) for one, other in zip(*products, strict=True))
    assert largest <= 1e-5
    return f"equal to {largest:.0e}"


def check_head_of_tied_tokens(folder: Path) -> str:
    """Tokens trained on a base that ties its head: PEFT changes embedding and head, and so does `ties_vocab`."""
    make_base(folder / "base", tie_word_embeddings=True)
    train(folder / "base", folder / "a", trainable_token_indices=[2, 9, 299])
    theirs = merge_by_peft(folder / "base", folder / "a")
    adapter = Adapter.open(folder / "a")
    assert adapter.ties_vocab
    assert torch.equal(theirs["lm_head.weight"], theirs["model.embed_tokens.weight"])
    return compare(folder / "base", adapter, theirs)


def refused(change: Callable[[Path], None], line: str, *, against_base: bool = False) -> Callable[[Path], str]:
    """A check that an adapter, once changed, is refused in one line that has these words."""

    def check(folder: Path) -> str:
        make_base(folder / "base")
        train(folder / "base", folder / "a")
        change(folder / "a")
        try:
            adapter = Adapter.open(folder / "a")
            if against_base:
                check_shapes({"a": adapter}, read_decoder(Base.open(folder / "base").config))
            adapter.dense(min(adapter.modules))
        except InputError as error:
            assert line in str(error), error
            return str(error)
        raise AssertionError("not refused")

    return check


def configure(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | settings))

    return change


def rename_keys(rename: Callable[[str], str]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_file({rename(key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)

    return change


def tune_fully(folder: Path) -> None:
    """Makes the folder one of mlx-lm's, with whole weights."""
    shutil.move(folder / WEIGHTS, folder / "adapters.safetensors")
    (folder / CONFIG).write_text(
        json.dumps({"fine_tune_type": "full", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0}})
    )


def add_second_adapter(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    both = {key.replace(".weight", f".{name}.weight"): t.clone() for key, t in tensors.items() for name in ("default", "other")}
    save_file(both, folder / WEIGHTS)


DELTA, LOADED = "merge_and_unload", "loads it, and leaves out what does not match"
EVERY_EMBEDDING = {"modules_to_save": ["embed_tokens", "lm_head"]}

EQUAL: dict[str, tuple[str, Callable[[Path], str]]] = {
    "PEFT folder with patterns and rsLoRA": (
        DELTA,
        as_peft({"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*_proj": 5}}),
    ),
    "PEFT folder of DoRA": (DELTA, as_peft({"use_dora": True})),
    "keys with the adapter's name": (DELTA, renamed(insert_adapter_name)),
    "keys with the adapter's name, DoRA": (DELTA, renamed(insert_adapter_name, use_dora=True)),
    "keys of torch.compile and DDP": (
        DELTA,
        renamed(lambda key: "module._orig_mod." + key.replace(".self_attn.", "._orig_mod.self_attn.")),
    ),
    "keys without base_model.model": (DELTA, renamed(lambda key: key.removeprefix("base_model.model."))),
    "keys with model.language_model": (DELTA, renamed(lambda key: key.replace("model.layers", "model.language_model.layers"))),
    "keys with language_model.model": (DELTA, renamed(lambda key: key.replace("model.layers", "language_model.model.layers"))),
    "keys of the model without a head": (DELTA, renamed(lambda key: key.replace("model.model.layers", "model.layers"))),
    "adapter of a multimodal Gemma 3": (DELTA, check_multimodal),
    "adapter in bfloat16": (DELTA, renamed(str, torch.bfloat16)),
    "adapter in float16": (DELTA, renamed(str, torch.float16)),
    "one adapter of a wrapper and one of the text model, mixed": (DELTA, check_one_of_each_wrapper),
    "vocabulary with rows added": (DELTA, as_peft({}, resize=310)),
    "vocabulary with fewer rows": (DELTA, as_peft({}, resize=290)),
    "vocabulary with rows added, embedding and head trained": (DELTA, as_peft(EVERY_EMBEDDING, resize=310)),
    "vocabulary with rows added, LoRA on embedding and head": (
        DELTA,
        as_peft({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, resize=310),
    ),
    "vocabulary with rows added, tokens trained": (DELTA, as_peft({"trainable_token_indices": [300, 309]}, resize=310)),
    "trainable tokens": (DELTA, as_peft({"trainable_token_indices": [2, 9, 299]})),
    "trainable tokens of embedding and head": (
        DELTA,
        as_peft({"trainable_token_indices": {"embed_tokens": [2, 9], "lm_head": [7]}}),
    ),
    "trainable tokens of a tied base": (DELTA, check_head_of_tied_tokens),
    "lora_bias": (DELTA, as_peft({"lora_bias": True, "target_modules": ["q_proj", "o_proj"]}, {"attention_bias": True})),
    "bias = all": (DELTA, as_peft({"bias": "all"}, {"attention_bias": True, "mlp_bias": True})),
    "bias = lora_only": (DELTA, as_peft({"bias": "lora_only", "target_modules": ["q_proj"]}, {"attention_bias": True})),
    "MLX folder": (DELTA, as_mlx("lora")),
    "MLX folder of DoRA": (DELTA, as_mlx("dora")),
    "GGUF adapter": (DELTA, check_gguf),
    "GGUF adapter that edgelora writes": (DELTA, check_written_gguf),
}
REFUSED: dict[str, tuple[str, Callable[[Path], str]]] = {
    "rank in the config that the weights contradict": ("a size mismatch, with a traceback", refused(configure(r=8), "rank")),
    "adapter of other modules than the base's": (
        LOADED,
        refused(rename_keys(lambda key: key.replace("layers.", "blocks.")), "14 of its 14 modules", against_base=True),
    ),
    "adapter of some modules that the base lacks": (
        LOADED,
        refused(rename_keys(lambda key: key.replace("layers.1.", "layers.7.")), "7 of its 14 modules", against_base=True),
    ),
    "two adapters in one file": (LOADED, refused(add_second_adapter, "same tensor")),
    "pattern that takes exponential time": (
        "hangs",
        refused(configure(alpha_pattern={"(.*a+)+b": 4}), "repeats a group"),
    ),
    "pattern that is no expression": (
        "re.error",
        refused(configure(alpha_pattern={"q_proj(": 4}), "is not a regular expression"),
    ),
    "MLX folder of a fully tuned model": ("does not read MLX", refused(tune_fully, "fine_tune_type is 'full'")),
    "adapter of another kind": ("reads LoHa", refused(configure(peft_type="LOHA"), "only LORA adapters")),
    "activated LoRA": ("reads it", refused(configure(alora_invocation_tokens=[5, 6]), "alora_invocation_tokens")),
}
CASES: list[Case] = [
    *(Case(name, "adapter", theirs, "equal", check) for name, (theirs, check) in EQUAL.items()),
    *(Case(name, "adapter", theirs, "refused", check) for name, (theirs, check) in REFUSED.items()),
]
