"""Variants whose adapters change or add biases compute what PEFT computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from transformers import Qwen2Config

from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.bundle.gate import Gate
from edgelora_export.plan.adapted_decoder import adapt_decoder
from edgelora_export.plan.calibration import Calibration, Sample
from edgelora_export.plan.variants import Quantization, Variant
from edgelora_export.weights.merged import read_bias
from edgelora_runtime import Runtime
from edgelora_runtime.errors import InputError
from tests.own_kernels import needs_kernels
from tests.tiny import LINEARS, build_variants, load_base, make_base, random_tokens, torch_logits
from tests.trained_changes import Trained, TrainedChange, mean_kl, train_somewhat

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TOKENS = random_tokens(30, seed=9)
# By name: settings of make_base, and settings of train_somewhat.
KINDS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora-bias": ({}, {"lora_bias": True, "target_modules": list(LINEARS)}),
    "lora-bias-on-one-part": ({}, {"lora_bias": True, "target_modules": ["k_proj"], "use_rslora": True}),
    "lora-bias-on-padded-heads": (
        {"head_dim": 24},
        {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    ),
    "lora-bias-beside-biases": ({"attention_bias": True, "head_dim": 24}, {"lora_bias": True}),
    "all": ({"attention_bias": True, "mlp_bias": True}, {"bias": "all"}),
    "lora-only": ({"attention_bias": True, "mlp_bias": True}, {"bias": "lora_only"}),
    "qwen2": ({"config_class": Qwen2Config, "vocab_size": 304}, {"bias": "all", "target_modules": ["q_proj", "o_proj"]}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Trained]:
    folder = tmp_path_factory.mktemp("biases")
    found = {}
    for name, (shape, settings) in KINDS.items():
        make_base(folder / name / "base", **shape)
        found[name] = train_somewhat(folder / name / "base", folder / name / "adapter", size=0.1, **settings)
    return found


def base_of(trained: Trained) -> Path:
    return trained.folder.with_name("base")


def build(trained: Trained, output: Path, **settings: Any) -> Runtime:
    """Builds a bundle of the base and the adapter, and opens it."""
    calibration = settings.pop("calibration", Calibration())
    variants = [Variant("base"), Variant("v", {"a": 1.0}, delta=trained.change, calibration=calibration)]
    build_variants(Base.open(base_of(trained)), variants, output, base_calibration=calibration, **settings)
    return Runtime(output)


@pytest.mark.parametrize("name", KINDS)
def test_float32_is_pefts_unmerged_forward(name: str, trained: Mapping[str, Trained], tmp_path: Path) -> None:
    each = trained[name]
    assert each.change.biases
    with build(each, tmp_path / "out", quantization=Quantization(bits=32)) as runtime:
        wanted = torch_logits(each.model, TOKENS)
        found, bare = runtime.logits(TOKENS, variant="v"), runtime.logits(TOKENS, variant="base")
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
        assert np.abs(bare - torch_logits(load_base(base_of(each)), TOKENS)).max() <= 1e-5 * np.abs(bare).max()
        without = TrainedChange(each.change.weights)
        build_variants(
            Base.open(base_of(each)), [Variant("v", delta=without)], tmp_path / "less", quantization=Quantization(bits=32)
        )
    with Runtime(tmp_path / "less") as runtime:
        assert np.abs(runtime.logits(TOKENS, variant="v") - wanted).max() > 0.05, "the biases should matter"


def test_what_padding_adds_stays_zero(trained: Mapping[str, Trained]) -> None:
    each = trained["lora-bias-on-padded-heads"]
    base = Base.open(base_of(each))
    decoder = adapt_decoder(read_decoder(base.config), each.change)
    qkv = decoder.layers[0].qkv
    bias = read_bias(base, qkv, each.change).reshape(-1, decoder.head_size)
    assert decoder.head_size == 32
    assert (np.count_nonzero(bias, axis=1) == 24).all()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_int4_costs_what_it_costs_the_bare_base(method: str, trained: Mapping[str, Trained], tmp_path: Path) -> None:
    each = trained["lora-bias"]
    fit = Calibration(fit=tuple(Sample(tuple(random_tokens(48, seed=seed))) for seed in range(40, 48)))
    with build(each, tmp_path / "out", calibration=fit, quantization=Quantization(method=method)) as runtime:
        usual = mean_kl(torch_logits(load_base(base_of(each)), TOKENS), runtime.logits(TOKENS, variant="base"))
        assert mean_kl(torch_logits(each.model, TOKENS), runtime.logits(TOKENS, variant="v")) < 2 * usual


@needs_kernels
def test_own_kernels_and_gpu_graphs(trained: Mapping[str, Trained], tmp_path: Path) -> None:
    each = trained["lora-bias"]
    build(each, tmp_path / "out", quantization=Quantization(bits=8, method="rtn"), targets=("cpu", "gpu")).close()
    wanted = torch_logits(each.model, TOKENS)
    for settings in ({"kernels": "edgelora"}, {"kernels": "onnxruntime"}, {"target": "gpu", "provider": "cpu"}):
        with Runtime(tmp_path / "out", **settings) as runtime:  # type: ignore[arg-type]
            assert mean_kl(wanted, runtime.logits(TOKENS, variant="v")) < 0.01, settings


def test_the_teacher_has_the_biases(trained: Mapping[str, Trained], tmp_path: Path) -> None:
    each = trained["all"]
    held_out = (Sample(tuple(TOKENS)),)
    with build(
        each,
        tmp_path / "out",
        calibration=Calibration(held_out=held_out),
        quantization=Quantization(bits=8, method="rtn"),
        gate=Gate(retention=0.5),
    ) as runtime:
        found = runtime.variants["v"].fidelity
    assert found is not None
    bare = torch_logits(load_base(base_of(each)), TOKENS)[:-1]
    assert found.adapter_kl == pytest.approx(mean_kl(torch_logits(each.model, TOKENS)[:-1], bare), rel=1e-4)
    assert found.kl_mean < 0.01 * found.adapter_kl


def test_biases_alone_leave_every_product_to_the_base(trained: Mapping[str, Trained], tmp_path: Path) -> None:
    change = TrainedChange({}, trained["lora-bias"].change.biases)
    with build(
        Trained(trained["lora-bias"].folder, None, change), tmp_path / "out", quantization=Quantization(method="rtn")
    ) as runtime:
        graphs = {name: set(entry.graphs["cpu"].blobs) for name, entry in runtime.variants.items()}
        assert graphs["base"] < graphs["v"]
        assert len(graphs["v"] - graphs["base"]) == 1
        assert np.abs(runtime.logits(TOKENS, variant="v") - runtime.logits(TOKENS, variant="base")).max() > 0.05


@pytest.mark.parametrize(
    ("biases", "message"),
    [
        ({"model.norm": (64,)}, "variant v changes the bias of model.norm, but only linear layers"),
        ({"lm_head": (300,)}, "variant v changes the bias of lm_head, but only linear layers"),
        ({"model.layers.0.self_attn.q_proj": (63,)}, r"the bias of model.layers.0.self_attn.q_proj has shape \(63,\)"),
    ],
)
def test_other_biases_are_refused_by_name(biases: dict[str, tuple[int]], message: str, tiny_base: Path, tmp_path: Path) -> None:
    change = TrainedChange({}, {module: np.ones(shape, np.float32) for module, shape in biases.items()})
    with pytest.raises(InputError, match=message):
        build_variants(Base.open(tiny_base), [Variant("v", {"a": 1.0}, delta=change)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_live_variant_with_biases_is_refused(trained: Mapping[str, Trained], tmp_path: Path) -> None:
    each = trained["lora-bias"]
    variant = Variant("v", {"a": 1.0}, delta=each.change, live={"a": 1.0})
    with pytest.raises(InputError, match=r"variant v cannot be live: it changes the bias of model\.layers\.0"):
        build_variants(Base.open(base_of(each)), [variant], tmp_path / "out")


def test_adapting_twice_changes_nothing(trained: Mapping[str, Trained]) -> None:
    each = trained["lora-bias"]
    decoder = read_decoder(Base.open(base_of(each)).config)
    adapted = adapt_decoder(decoder, each.change)
    assert adapted is not decoder
    assert adapt_decoder(adapted, each.change) is adapted
    assert adapt_decoder(decoder, TrainedChange(each.change.weights)) is decoder
