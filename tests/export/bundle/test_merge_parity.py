"""Merged and live variants compute the same as PEFT with the same adapters."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from edgelora.adapters.folder import Adapter
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora.mix.mix import Mix
from edgelora_export.plan.variants import Quantization
from edgelora_runtime import Bundle, Runtime
from edgelora_runtime.errors import InputError
from tests.own_kernels import needs_kernels
from tests.tiny import load_base, random_tokens, torch_logits

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TOLERANCE = 1e-3
TOKENS = random_tokens(40, seed=11)
SINGLES = ("plain", "other", "rslora", "patterns", "attention")
LINEAR = {"plain": 0.6, "attention": -0.4, "rslora": 0.3}


def with_delta(base: Path, mix: Mapping[str, float], folders: Mapping[str, Path], method: str, density: float) -> Any:
    """Loads the base in transformers and adds ΔW, computed in float64 from PEFT's deltas by the formula of the method."""
    model = load_base(base)
    deltas = {name: peft_deltas(base, folders[name]) for name in mix}
    with torch.no_grad():
        for module in sorted(set().union(*deltas.values())):
            parts = [(deltas[name][module], weight) for name, weight in mix.items() if module in deltas[name]]
            total = reference_ties(parts, density) if method == "ties" else sum(delta * weight for delta, weight in parts)
            weight = model.get_submodule(module).weight
            weight += torch.from_numpy(np.asarray(total)).float()
    return model


def peft_deltas(base: Path, folder: Path) -> dict[str, Any]:
    """Returns ΔW in float64 by module, as PEFT's layers compute it."""
    model = PeftModel.from_pretrained(load_base(base), str(folder))
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): layer.get_delta_weight("default").double().numpy()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and "default" in layer.lora_A
    }


def reference_ties(parts: list[tuple[Any, float]], density: float) -> Any:
    """Computes TIES entry by entry, as described in the paper."""
    trimmed = []
    for delta, weight in parts:
        order = np.argsort(-np.abs(delta), axis=None)
        mask = np.zeros(delta.size, bool)
        mask[order[: int(np.ceil(density * delta.size))]] = True
        trimmed.append(weight * np.where(mask.reshape(delta.shape), delta, 0.0))
    merged = np.zeros_like(trimmed[0])
    for index in np.ndindex(merged.shape):
        values = [float(part[index]) for part in trimmed]
        sign = np.sign(sum(values))
        agreeing = [value for value in values if value != 0 and np.sign(value) == sign]
        merged[index] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


def round_factors(adapter: Path, copy: Path) -> Path:
    """Copies an adapter and rounds its factors to what fp16 holds: A, and B times the scale, as bundles store them."""
    shutil.copytree(adapter, copy)
    weights = load_file(copy / "adapter_model.safetensors")
    opened = Adapter.open(copy)
    scales = {module: np.float32(opened.scale(module)) for module in opened.modules}
    for key, tensor in weights.items():
        module, _, kind = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        scale = scales[module] if kind == "B" else np.float32(1)
        weights[key] = (tensor * scale).astype(np.float16).astype(np.float32) / scale
    save_file(weights, copy / "adapter_model.safetensors")
    return copy


def sum_ranks(adapters: Mapping[Path, float], output: Path) -> Path:
    """Writes the weighted sum of several adapters as one adapter. Factors are concatenated, and B holds weights and scales."""
    weights: dict[str, Any] = {}
    for folder, weight in adapters.items():
        opened = Adapter.open(folder)
        for key, tensor in load_file(folder / "adapter_model.safetensors").items():
            module, _, kind = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
            factor = tensor if kind == "A" else tensor * np.float32(weight * opened.scale(module))
            parts = [weights[key], factor] if key in weights else [factor]
            weights[key] = np.concatenate(parts, axis=0 if kind == "A" else 1)
    output.mkdir()
    config = json.loads((next(iter(adapters)) / "adapter_config.json").read_text(encoding="utf-8"))
    rank = next(len(tensor) for key, tensor in weights.items() if ".lora_A." in key)
    (output / "adapter_config.json").write_text(json.dumps(config | {"r": rank, "lora_alpha": rank}), encoding="utf-8")
    save_file(weights, output / "adapter_model.safetensors")
    return output


@pytest.mark.parametrize("name", SINGLES)
def test_merged_variant_is_pefts_forward_and_merge(
    name: str, runtime: Runtime, tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    ours = runtime.logits(TOKENS, variant=name)
    model = PeftModel.from_pretrained(load_base(tiny_base), str(tiny_adapters[name])).eval()
    assert np.abs(ours - torch_logits(model, TOKENS)).max() <= TOLERANCE
    merged = model.merge_and_unload()
    assert np.abs(ours - torch_logits(merged, TOKENS)).max() <= TOLERANCE
    assert np.abs(ours - runtime.logits(TOKENS, variant="base")).max() > 0.1, "the adapter should matter"


@pytest.mark.parametrize(
    ("variant", "mix", "method"), [("linear", LINEAR, "linear"), ("ties", {"plain": 0.7, "other": 0.5}, "ties")]
)
def test_merged_mix_is_the_formula_on_pefts_deltas(
    variant: str, mix: dict[str, float], method: str, runtime: Runtime, tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    reference = with_delta(tiny_base, mix, tiny_adapters, method, density=0.3)
    assert np.abs(runtime.logits(TOKENS, variant=variant) - torch_logits(reference, TOKENS)).max() <= TOLERANCE


@pytest.mark.parametrize(("live", "merged"), [("plain-live", "plain"), ("linear-live", "linear")])
def test_live_variant_is_the_merged_one(live: str, merged: str, runtime: Runtime) -> None:
    """The stored factors are fp16, so the two differ by its rounding: 2^-11 of ΔW, which is small compared with W."""
    one, other = runtime.logits(TOKENS, variant=live), runtime.logits(TOKENS, variant=merged)
    assert np.abs(one - other).max() <= 1e-3 * other.std()


@pytest.mark.parametrize("name", SINGLES)
def test_live_adapter_with_factors_that_fp16_holds_equals_the_merged_one(
    name: str, tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """If the stored factors need no rounding, the live variant is exact to float32."""
    folder = round_factors(tiny_adapters[name], tmp_path / "adapter")
    variants = {"merged": VariantRecipe({"a": 1.0}), "alive": VariantRecipe({"a": 1.0}, kind="live")}
    export(Recipe(str(tiny_base), {"a": folder}, variants, Quantization(bits=32)), tmp_path / "bundle")
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        live, merged = (runtime.logits(TOKENS, variant=variant) for variant in ("alive", "merged"))
        assert np.abs(live - merged).max() <= 1e-4


def test_request_time_mix_is_the_mix_composed_ahead(runtime: Runtime) -> None:
    live = runtime.logits(TOKENS, mix=LINEAR)
    np.testing.assert_array_equal(live, runtime.logits(TOKENS, variant="linear-live"))
    merged = runtime.logits(TOKENS, variant="linear")
    assert np.abs(live - merged).max() <= 1e-3 * merged.std()


@pytest.mark.parametrize("kernels", [pytest.param("edgelora", marks=needs_kernels), "onnxruntime"])
def test_int4_mix_of_a_request_is_the_adapter_composed_ahead(
    kernels: str, tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The weights are powers of two, so that fp16 holds the composed factors as exactly as the single ones."""
    mix = {"plain": 0.5, "other": -2.0}
    adapters = {name: round_factors(tiny_adapters[name], tmp_path / name) for name in mix}
    adapters["sum"] = sum_ranks({adapters[name]: weight for name, weight in mix.items()}, tmp_path / "sum")
    variants = {"sum": VariantRecipe({"sum": 1.0}, kind="live")}
    export(Recipe(str(tiny_base), adapters, variants, Quantization(method="rtn")), tmp_path / "bundle", gate="off")
    with Runtime(tmp_path / "bundle", threads=1, kernels=kernels) as runtime:
        mixed, composed, bare = (runtime.logits(TOKENS, mix=each) for each in (mix, {"sum": 1.0}, {}))
    assert np.abs(composed - bare).max() > 0.01
    assert np.abs(mixed - composed).max() <= 1e-4


def test_request_time_mix_of_an_adapter_that_no_variant_uses_live(
    runtime: Runtime, tiny_base: Path, tiny_adapters: dict[str, Path]
) -> None:
    mix = {"patterns": 1.5, "other": -0.7}
    reference = with_delta(tiny_base, mix, tiny_adapters, "linear", density=1.0)
    assert np.abs(runtime.logits(TOKENS, mix=mix) - torch_logits(reference, TOKENS)).max() <= 5 * TOLERANCE


def test_no_adapter_at_all_is_the_base(runtime: Runtime) -> None:
    base = runtime.logits(TOKENS, variant="base")
    for mix in ({}, {"plain": 0.0}, {"plain": 0.0, "other": 0.0}):
        np.testing.assert_allclose(runtime.logits(TOKENS, mix=mix), base, atol=1e-5)


def test_live_inputs_go_back_to_rank_0_after_a_mix(runtime: Runtime) -> None:
    base = runtime.logits(TOKENS, mix={})
    for mix in ({"plain": 1.0}, {"attention": 1.0}, {"other": 2.0, "patterns": -1.0}):
        assert np.abs(runtime.logits(TOKENS, mix=mix) - base).max() > 0.01
        np.testing.assert_array_equal(runtime.logits(TOKENS, mix={}), base)


def test_more_mixes_than_are_kept_stacked(runtime: Runtime) -> None:
    mixes = [{"plain": 0.1 * step, "other": 0.2} for step in range(1, 14)]
    first = [runtime.logits(TOKENS[:8], mix=mix) for mix in mixes]
    for mix, logits in zip(mixes, first, strict=True):
        np.testing.assert_array_equal(runtime.logits(TOKENS[:8], mix=mix), logits)


def test_weights_w_and_minus_w_cancel(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path, runtime: Runtime) -> None:
    adapters = {"one": tiny_adapters["rslora"], "same": tiny_adapters["rslora"]}
    cancelled = {"one": 0.8, "same": -0.8}
    variants = {"merged": VariantRecipe(cancelled), "alive": VariantRecipe(cancelled, kind="live")}
    export(Recipe(str(tiny_base), adapters, variants, Quantization(bits=32)), tmp_path / "bundle")
    base = runtime.logits(TOKENS, variant="base")
    with Runtime(tmp_path / "bundle", threads=1) as cancelling:
        for variant in variants:
            assert np.abs(cancelling.logits(TOKENS, variant=variant) - base).max() <= 1e-4


def test_weights_by_module_and_the_manifest_says_so(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    by_module = {"*": 0.6, "model.layers.0.*": -0.3, "*.mlp.*": 0.0}
    variants = {
        "linear": VariantRecipe({"plain": by_module, "rslora": 0.4}),
        "dropped": VariantRecipe({"plain": {"*.q_proj": 1.0}}, method="dare_linear", density=0.5, seed=3),
    }
    export(Recipe(str(tiny_base), tiny_adapters, variants, Quantization(bits=32)), tmp_path / "bundle")
    model, dropped = load_base(tiny_base), load_base(tiny_base)
    deltas = {name: peft_deltas(tiny_base, tiny_adapters[name]) for name in ("plain", "rslora")}
    mix = Mix({"plain": Adapter.open(tiny_adapters["plain"], "plain")}, {"plain": 1.0}, "dare_linear", 0.5, 3)
    with torch.no_grad():
        for module, delta in deltas["plain"].items():
            weight = 0.0 if ".mlp." in module else -0.3 if "layers.0." in module else 0.6
            total = weight * delta + 0.4 * deltas["rslora"][module]
            model.get_submodule(module).weight += torch.from_numpy(total).float()
            if module.endswith("q_proj"):
                dropped.get_submodule(module).weight += torch.from_numpy(mix.dense(module))
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        for name, expected in (("linear", model), ("dropped", dropped)):
            assert np.abs(runtime.logits(TOKENS, variant=name) - torch_logits(expected, TOKENS)).max() <= TOLERANCE
    found = Bundle.open(tmp_path / "bundle").manifest.variants
    assert (found["linear"].mix, found["linear"].weights) == ({"plain": 0.6, "rslora": 0.4}, {"plain": by_module})
    assert list(found["linear"].weights["plain"]) == list(by_module)
    assert (found["linear"].density, found["linear"].seed) == (None, None)
    assert (found["dropped"].mix, found["dropped"].weights) == ({"plain": 0.0}, {"plain": {"*.q_proj": 1.0}})
    assert (found["dropped"].method, found["dropped"].density, found["dropped"].seed) == ("dare_linear", 0.5, 3)


def test_a_live_variant_has_one_weight_per_adapter(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    variants = {"alive": VariantRecipe({"plain": {"*": 1.0}}, kind="live")}
    with pytest.raises(InputError, match=r"alive cannot be live \(plain weighs by module\).*edgelora compose"):
        export(Recipe(str(tiny_base), tiny_adapters, variants, Quantization(bits=32)), tmp_path / "bundle")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_order_does_not_matter(method: str, tiny_adapters: dict[str, Path]) -> None:
    adapters = {name: Adapter.open(folder, name) for name, folder in tiny_adapters.items()}
    forward = Mix(adapters, LINEAR, method, 0.4)
    backward = Mix(adapters, dict(reversed(LINEAR.items())), method, 0.4)
    for module in forward.modules:
        np.testing.assert_allclose(forward.dense(module), backward.dense(module), rtol=0, atol=1e-6)


def test_order_does_not_matter_live(runtime: Runtime) -> None:
    np.testing.assert_array_equal(runtime.logits(TOKENS, mix=LINEAR), runtime.logits(TOKENS, mix=dict(reversed(LINEAR.items()))))


@pytest.mark.parametrize("shape", [{"head_dim": 12, "attention_bias": True}, {"head_dim": 20, "num_key_value_heads": 4}])
def test_adapters_on_padded_heads(shape: dict[str, Any], tmp_path: Path) -> None:
    """Head padding applies to B of q, k and v, and to A of o."""
    from tests.tiny import make_adapter, make_base

    make_base(tmp_path / "base", **shape)
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    variants = {"merged": VariantRecipe({"a": 1.0}), "alive": VariantRecipe({"a": 1.0}, kind="live")}
    export(Recipe(str(tmp_path / "base"), {"a": tmp_path / "adapter"}, variants, Quantization(bits=32)), tmp_path / "bundle")
    model = PeftModel.from_pretrained(load_base(tmp_path / "base"), str(tmp_path / "adapter"))
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        for variant in variants:
            assert np.abs(runtime.logits(TOKENS, variant=variant) - torch_logits(model, TOKENS)).max() <= 2 * TOLERANCE


def test_live_adapters_whose_rank_differs_from_product_to_product(tiny_base: Path, tmp_path: Path) -> None:
    """Some products have no factors at all: rank 0 next to rank 4, in every place of the graph."""
    from tests.tiny import LINEARS, make_adapter

    settings: dict[str, dict[str, Any]] = {target: {"target_modules": [target]} for target in LINEARS}
    settings["second_layer"] = {"layers_to_transform": [1]}
    settings["every_rank"] = {"rank_pattern": {target: rank for rank, target in enumerate(LINEARS, start=1)}}
    for name, kind in settings.items():
        make_adapter(tiny_base, tmp_path / name, **kind)
    variants = {name: VariantRecipe({name: 1.0}) for name in settings}
    variants["alive"] = VariantRecipe({"every_rank": 1.0}, kind="live")
    adapters = {name: tmp_path / name for name in settings}
    export(Recipe(str(tiny_base), adapters, variants, Quantization(bits=32)), tmp_path / "bundle")
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        for name in settings:
            for count in (1, 2, 40):
                live, merged = runtime.logits(TOKENS[:count], mix={name: 1.0}), runtime.logits(TOKENS[:count], variant=name)
                assert np.abs(live - merged).max() <= 2e-3 * merged.std(), name


def test_base_of_a_bundle_without_merged_variants(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    """The base's products are stored even if all variants are live."""
    variants = {"alive": VariantRecipe({"a": 1.0}, kind="live")}
    export(Recipe(str(tiny_base), {"a": tiny_adapters["attention"]}, variants, Quantization(bits=32)), tmp_path / "bundle")
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        base = torch_logits(load_base(tiny_base), TOKENS)
        assert np.abs(runtime.logits(TOKENS, mix={}) - base).max() <= TOLERANCE


def test_int4_live_keeps_the_adapter_that_int4_merged_rounds(bundle4: Path, runtime: Runtime) -> None:
    """Both stay close to the float32 variant. The live one has only the base's own error."""
    with Runtime(bundle4, threads=1) as quantized:
        exact, bare = runtime.logits(TOKENS, variant="plain"), runtime.logits(TOKENS, variant="base")
        base_error = np.square(quantized.logits(TOKENS, variant="base") - bare).mean()
        live_error = np.square(quantized.logits(TOKENS, variant="plain-live") - exact).mean()
        merged_error = np.square(quantized.logits(TOKENS, variant="plain") - exact).mean()
    assert live_error <= 1.5 * base_error
    assert merged_error <= 1.5 * base_error


def test_untouched_products_are_stored_once(bundle4: Path) -> None:
    """The adapter `attention` leaves the MLPs unchanged. Its graph maps the base's blobs for them, and adds blobs only for
    attention.
    """
    from edgelora_runtime import Bundle

    manifest = Bundle.open(bundle4).manifest
    base, attention = (set(manifest.variants[name].graphs["cpu"].blobs) for name in ("base", "attention"))
    assert len(attention - base) == 4  # qkv and output of two layers
    assert len(base & attention) == len(base) - 4
    live = set(manifest.variants["plain-live"].graphs["cpu"].blobs)
    assert live == base
