"""Every writer's names of tensors come out as one module and one kind, and patterns and gaps as PEFT sees them."""

from __future__ import annotations

import contextlib
import re
import time
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora.adapters.coverage import list_gaps
from edgelora.adapters.gguf_file import ARCHITECTURES, GGUFNames, Heads
from edgelora.adapters.names import IGNORED, parse_name, plain_module, show_names
from edgelora.adapters.patterns import check_patterns, find_pattern
from edgelora_runtime.errors import InputError

MODULE = "model.layers.3.self_attn.q_proj"
KINDS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
FORMS = {
    "plain": "base_model.model.{module}.{kind}",
    "bare": "{module}.{kind}",
    "compiled": "_orig_mod.base_model.model.{module}.{kind}",
    "ddp": "module.base_model.model.{module}.{kind}",
    "fsdp": "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.{module}.{kind}",
    "twice wrapped by PEFT": "base_model.model.base_model.model.{module}.{kind}",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ["", "default", "my-adapter", "weights"])
def test_names_of_factors(form: str, kind: str, adapter: str) -> None:
    first, _, last = kind.partition(".")
    spelled = ".".join(part for part in (first, adapter, last) if part)
    name = parse_name(form.format(module=MODULE, kind=spelled))
    assert name is not None
    assert (name.module, name.kind, name.adapter) == (MODULE, kind, adapter)


OTHERS = {
    "lm_head.weight": ("lm_head", "weight", False),
    "model.embed_tokens.modules_to_save.default.weight": ("model.embed_tokens", "weight", True),
    "model.embed_tokens.modules_to_save.weight": ("model.embed_tokens", "weight", True),
    "model.embed_tokens.original_module.weight": ("model.embed_tokens", IGNORED, False),
    "model.embed_tokens.base_layer.weight": ("model.embed_tokens", "base_layer.weight", False),
    "model.embed_tokens.token_adapter.base_layer.weight": ("model.embed_tokens", "base_layer.weight", False),
    "model.embed_tokens.token_adapter.trainable_tokens_delta": ("model.embed_tokens", "trainable_tokens_delta", False),
    "model.embed_tokens.token_adapter.trainable_tokens_delta.default": ("model.embed_tokens", "trainable_tokens_delta", False),
    "model.embed_tokens.token_adapter.trainable_tokens_original.default": ("model.embed_tokens", IGNORED, False),
    f"{MODULE}.base_layer.bias": (MODULE, "base_layer.bias", False),
    f"{MODULE}.bias": (MODULE, "bias", False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_saved_layers(name: str) -> None:
    found = parse_name(f"base_model.model.{name}")
    assert found is not None
    assert (found.module, found.kind, found.is_copy) == OTHERS[name]


@pytest.mark.parametrize("name", ["", "lora_A", f"{MODULE}.lora_A.bias", f"{MODULE}.lora_C.scale", f"{MODULE}.ia3_l"])
def test_names_of_no_lora_adapter(name: str) -> None:
    assert parse_name(name) is None


@pytest.mark.parametrize(
    ("spelled", "plain"),
    [
        ("model.language_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("language_model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("model.text_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("model.language_model.embed_tokens", "model.embed_tokens"),
        ("language_model.lm_head", "lm_head"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1", "model.vision_tower.encoder.layers.0.mlp.fc1"),
        ("model.visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
    ],
)
def test_modules_of_multimodal_wrappers(spelled: str, plain: str) -> None:
    assert plain_module(spelled) == plain


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_not(name: str) -> None:
    found = parse_name(name)
    assert found is None or found.module


@given(st.lists(st.text(min_size=1, max_size=9), max_size=9), st.integers(1, 5))
def test_shown_names_are_printable_and_few(names: list[str], count: int) -> None:
    shown = show_names(names, count)
    assert shown.isprintable()
    assert (f" and {len(names) - count} more" in shown) == (len(names) > count)


# --- patterns ---------------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.sampled_from(["q_proj", "proj", "0.self_attn.q_proj", r"layers\.\d\..*", "[qkv]_proj", MODULE, ".*q_proj"]), max_size=4
    )
)
def test_patterns_are_matched_as_peft_does(patterns: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    found = find_pattern(patterns, MODULE)
    assert (MODULE if found is None else found) == get_pattern_key(patterns, MODULE)


BAD = [
    r"(a+|\\)+x",
    "(?x:(a+) +x)",
    "(ab|a|b)" * 20 + "c",
    "a?" * 60 + "[^a]",
    "(a+)+$",
    "(.*)*x",
    "(a|aa)+b",
    "(",
    "a{2,1}",
    ".*.*.*.*.*x",
    r"(q)\1",
    "(?<=q)_proj",
    "q" * 600,
    "[",
    "(a+){9}",
]


@pytest.mark.parametrize("pattern", BAD)
def test_patterns_that_may_take_long_are_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="pattern"):
        find_pattern([pattern], MODULE)


def test_patterns_may_not_take_long_on_all_modules_together() -> None:
    check_patterns([".*[^a]"] * 10, ["a" * 60] * 300)
    with pytest.raises(InputError, match="patterns may take long on 9000 modules"):
        check_patterns([".*[^a]"] * 10, ["a" * 60] * 9000)


@given(st.text(alphabet="a.*+?()[]{}|\\d2,^$", max_size=24))
def test_any_pattern_is_matched_in_bounded_time(pattern: str) -> None:
    start = time.process_time()
    with contextlib.suppress(InputError):
        find_pattern([pattern], "a" * 60 + "." + "a" * 60)
    assert time.process_time() - start < 2


# --- gaps -------------------------------------------------------------------------------------------------------------------


def test_what_the_config_names_and_the_file_lacks_is_noted() -> None:
    modules = [f"model.layers.{layer}.self_attn.{name}" for layer in range(4) for name in ("q_proj", "v_proj")]
    assert list_gaps({"target_modules": ["q_proj", "self_attn.v_proj"]}, modules) == []
    assert list_gaps({"target_modules": "all-linear"}, modules) == []
    assert list_gaps({"target_modules": ["q_proj", "k_proj", "o_proj"]}, modules) == [
        "target_modules names k_proj, o_proj, which have no factors"
    ]
    assert list_gaps({"layers_to_transform": [0, 1, 2, 3, 6]}, modules) == [
        "layers_to_transform names 6, where nothing has factors"
    ]
    assert list_gaps({"layers_to_transform": [0, 2]}, [modules[0], modules[4]]) == []
    assert list_gaps({}, [name for name in modules if "2.self_attn.q_proj" not in name]) == [
        "self_attn.q_proj has factors in layers 0, 1 and 3, but not in 2"
    ]


# --- llama.cpp's names ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("gguf") is None, reason="needs the package gguf")
@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES.values()}))
def test_names_are_those_of_the_gguf_package(architecture: str) -> None:
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, 3)
    names = GGUFNames(architecture, Heads(4, 2))
    parts = (
        ("self_attn.qkv_proj", "mlp.gate_up_proj")
        if architecture == "phi3"
        else ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj")
    )
    for module in (*(f"model.layers.2.{part}" for part in (*parts, "self_attn.o_proj", "mlp.down_proj")), "model.embed_tokens"):
        tensor = names.tensor(module)
        assert tensor == f"{table.get_name(module)}.weight"
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor)
        assert found is not None
        assert names.module(found[1], found[2]) == module


def test_modules_that_llama_cpp_lacks_have_no_name() -> None:
    names = GGUFNames("llama", None)
    assert names.tensor("model.layers.0.mlp.gate_up_proj") is None
    assert names.tensor("transformer.h.0.attn.c_attn") is None
    assert names.module("0", "ffn_gate_inp") is None
