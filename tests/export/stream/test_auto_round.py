"""The auto-round backend: its weights become codes without further rounding, and without the package the error is one line."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config

from edgelora.adapters.folder import Adapter
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.bundle.gate import Gate
from edgelora_export.plan.adapted_decoder import adapt_decoder
from edgelora_export.plan.calibration import Calibration, Sample
from edgelora_export.plan.variants import Quantization, Variant
from edgelora_export.quantize.int4 import Grid, unpack_codes
from edgelora_export.stream import auto_round as auto_round_backend
from edgelora_export.stream.auto_round import read_codes
from edgelora_export.weights.stored import Storage
from edgelora_runtime import Bundle
from edgelora_runtime.bundle.manifest import AdapterEntry
from edgelora_runtime.errors import InputError, IntegrityError, MissingExtraError
from tests.tiny import ATTENTION, build_variants, load_base, make_adapter, make_base, random_tokens
from tests.trained_changes import train_somewhat

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora_export.quantize.int4 import BlockQuantized
    from edgelora_runtime.bundle.manifest import Manifest

    Floats = NDArray[np.float32]

needs_package = pytest.mark.skipif(
    find_spec("auto_round") is None, reason="auto-round is not installed: make test-auto-round has an environment with it"
)
LENGTHS = (40, 25, 31, 40, 12)
FIT = tuple(Sample(tuple(random_tokens(LENGTHS[seed % 5], seed=seed))) for seed in range(160))
HELD_OUT = tuple(Sample(tuple(random_tokens(30, seed=100 + seed))) for seed in range(5))
CALIBRATION = Calibration(FIT, HELD_OUT, {"rows.jsonl": "0" * 64})


def draw(rows: int, columns: int, block_size: int, *, symmetric: bool) -> tuple[Floats, Floats, Floats | None, Floats]:
    """A weight as auto-round computes it, scale * (q - zero) in float32, with its scales, zero points and codes."""
    generator = np.random.default_rng(columns + block_size)
    blocks = -(-columns // block_size)
    codes = generator.integers(0, 16, (rows, columns)).astype(np.float32)
    scales = (np.exp(generator.normal(-3, 1, (rows, blocks))) * np.where(generator.random((rows, blocks)) < 0.5, 1, -1)).astype(
        np.float32
    )
    zeros = None if symmetric else generator.integers(0, 16, (rows, blocks)).astype(np.float32)
    each = np.full((rows, blocks), 8, np.float32) if zeros is None else zeros
    by_column = [np.repeat(values, block_size, axis=1)[:, :columns] for values in (scales, each)]
    return by_column[0] * (codes - by_column[1]), scales, zeros, codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "block_size"), [(96, 32), (100, 32), (192, 64), (40, 64), (200, 128)])
def test_codes_are_read_back_exactly(columns: int, block_size: int, symmetric: bool) -> None:
    weight, scales, zeros, codes = draw(7, columns, block_size, symmetric=symmetric)
    found = read_codes(weight, scales, zeros, Grid(4, block_size, symmetric))
    assert np.array_equal(unpack_codes(found.codes, 4).reshape(7, -1)[:, :columns], codes)
    assert np.array_equal(found.scales, scales)
    assert (found.zero_points is None) == symmetric
    if zeros is not None and found.zero_points is not None:
        assert np.array_equal(unpack_codes(found.zero_points, 4)[:, : zeros.shape[1]], zeros)
    assert np.array_equal(found.dequantize(), weight)


def test_padded_rows_stay_zero() -> None:
    nothing = np.zeros((3, 64), np.float32)
    for zeros in (None, np.zeros((3, 2), np.float32)):
        found = read_codes(nothing, np.zeros((3, 2), np.float32), zeros, Grid(4, 32, zeros is None))
        assert not found.dequantize().any()


@pytest.mark.parametrize("change", ["off the grid", "below", "above", "not finite", "a half zero point", "a zero point above"])
def test_a_weight_off_the_grid_is_refused(change: str) -> None:
    weight, scales, zeros, _ = draw(4, 64, 32, symmetric="zero" not in change)
    if change == "off the grid":
        weight[1, 2] += 0.1 * scales[1, 0]
    elif change == "not finite":
        weight[1, 2] = np.nan
    elif zeros is not None:
        zeros[1, 1] += 0.5 if "half" in change else 16 - zeros[1, 1]
    else:
        weight[1, 2] = scales[1, 0] * (-9 if change == "below" else 8)
    with pytest.raises(IntegrityError, match="grid"):
        read_codes(weight, scales, zeros, Grid(4, 32, zeros is None))


def test_without_the_package_the_extra_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "auto_round", None)
    recipe = Recipe(str(tmp_path / "no-such-base"), {}, {"base": VariantRecipe({})}, Quantization(method="auto-round"))
    with pytest.raises(MissingExtraError, match=r"pip install 'edgelora\[auto-round\]'") as caught:
        export(recipe, tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="no-such-base"):
        export(replace(recipe, quantization=Quantization()), tmp_path / "bundle")


def test_other_bits_than_four_are_refused() -> None:
    with pytest.raises(InputError, match="auto-round"):
        Quantization(bits=8, method="auto-round")


def test_each_layer_keeps_its_own_positions_and_mask(tmp_path: Path) -> None:
    """auto-round calls all layers with the first layer's arguments; they must compute what the whole model computes."""
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    shape = {"head_dim": 16, "sliding_window": 7, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}
    make_base(tmp_path, config_class=Gemma3TextConfig, rope_parameters=rope, **shape)
    tokens = torch.tensor([random_tokens(30)])
    model = load_base(tmp_path)
    layers = model.model.layers
    first: dict[str, Any] = {}
    expected: list[Any] = []
    hooks = [layers[0].register_forward_pre_hook(lambda block, args, kwargs: first.update(kwargs), with_kwargs=True)]
    hooks += [layers[0].register_forward_pre_hook(lambda block, args: expected.append(args[0]))]
    hooks += [layer.register_forward_hook(lambda block, args, output: expected.append(output)) for layer in layers]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    called: list[int] = []
    auto_round_backend._keep_positions(model, read_decoder(Base.open(tmp_path).config), 30, called.append)
    states = expected[0]
    with torch.no_grad():
        for layer, after in zip(layers, expected[1:], strict=True):
            states = layer(states, **first)
            torch.testing.assert_close(states, after)
    assert called == list(range(len(layers)))


def test_sequences_of_one_length_lose_few_tokens() -> None:
    lengths = [*range(2, 40), 300]
    samples = [Sample(tuple(random_tokens(length, seed=length))) for length in lengths]
    rows = auto_round_backend._even_out(samples)
    assert len({len(row) for row in rows}) == 1
    kept = [min(length, len(rows[0])) for length in lengths]
    assert 0.98 * sum(lengths) <= sum(kept) < 0.99 * sum(lengths)
    for sample, row, count in zip(samples, rows, kept, strict=True):
        assert tuple(row[:count]) == sample.tokens[:count]
        assert set(row[count:]) <= {sample.tokens[-1]}


def build(base: Path, adapter: Path, output: Path, **settings: Any) -> Manifest:
    tuned = Adapter.open(adapter)
    return build_variants(
        Base.open(base),
        [Variant("base"), Variant("tuned", {"a": 1.0}, delta=tuned, calibration=CALIBRATION)],
        output,
        quantization=Quantization(**settings),
        adapters={"a": AdapterEntry("0" * 64, tuned.rank)},
        live_adapters={"a": tuned},
        base_calibration=CALIBRATION,
        gate=Gate(retention=-100.0),
    )


@needs_package
@pytest.mark.parametrize("grid", [{}, {"symmetric": False, "block_size": 64}, {"block_size": 128}], ids=str)
def test_diverges_less_than_rounding(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: dict[str, Any]
) -> None:
    monkeypatch.setattr(auto_round_backend, "ITERATIONS", 50)
    make_adapter(tiny_base, tmp_path / "adapter", size=0.3)
    divergence = {}
    for method in ("rtn", "auto-round"):
        manifest = build(tiny_base, tmp_path / "adapter", tmp_path / method, method=method, **grid)
        found = manifest.variants["tuned"].fidelity
        assert manifest.quantization.method == method and found is not None
        divergence[method] = found.kl_mean
        assert Bundle.open(tmp_path / method).verify(lambda name: None) == []
    assert divergence["auto-round"] < 0.95 * divergence["rtn"]


@needs_package
def test_shares_products_that_the_adapter_does_not_change_and_raises_patterns(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_round_backend, "ITERATIONS", 2)
    make_adapter(tiny_base, tmp_path / "adapter", target_modules=list(ATTENTION))
    manifest = build(tiny_base, tmp_path / "adapter", tmp_path / "bundle", method="auto-round", int8=("layers.0.mlp.*",))
    base, tuned = (set(manifest.variants[name].graphs["cpu"].blobs) for name in ("base", "tuned"))
    assert manifest.variants["base"].int8 == ("layers.0.mlp.gate_up", "layers.0.mlp.down")
    assert len(base - tuned) == len(tuned - base) == 4  # the attention's two products, in two layers


SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama, keys that it skips": (LlamaConfig, {"head_dim": 24}),
    "mistral, padded heads": (MistralConfig, {"head_dim": 24, "num_key_value_heads": 4}),
    "phi3, fused": (Phi3Config, {"pad_token_id": 1}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 16, "sliding_window": 7, "tie_word_embeddings": True}),
}


@needs_package
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_the_weights_that_torch_holds_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str, symmetric: bool
) -> None:
    config_class, settings = SHAPES[shape]
    make_base(tmp_path, config_class=config_class, **settings)
    base = Base.open(tmp_path)
    decoder = read_decoder(base.config)
    tuned, model = tune(base, decoder, monkeypatch, Quantization(symmetric=symmetric, method="auto-round"))
    before = load_base(tmp_path)
    skipped = {linear.name for linear in decoder.linears if any(part.out_features % 32 for part in linear.parts)}
    assert set(tuned) == {linear.name for linear in decoder.linears} - skipped
    assert bool(skipped) == ("skips" in shape)
    for linear in decoder.linears:
        if linear.name in skipped:
            continue
        stored, start = tuned[linear.name].dequantize(), 0
        assert stored.shape == (linear.rows, linear.columns)
        for part in linear.parts:
            rows = stored[start : start + part.graph_rows]
            start += part.graph_rows
            module = model.get_submodule(part.module)
            if isinstance(module, torch.nn.Sequential):  # a layer that was laid out for padded heads
                module = module[-1]
            np.testing.assert_array_equal(rows, part.pad_rows(module.weight.detach().numpy()))
            unrounded = part.pad_columns(part.pad_rows(before.get_submodule(part.module).weight.detach().numpy()))
            assert np.corrcoef(rows.ravel(), unrounded.ravel())[0, 1] > 0.98


def tune(
    base: Base, decoder: Any, monkeypatch: pytest.MonkeyPatch, quantization: Quantization
) -> tuple[dict[str, BlockQuantized], Any]:
    """All products of a bare base, and the torch model after auto-round."""
    monkeypatch.setattr(auto_round_backend, "ITERATIONS", 2)
    storage = Storage(base, decoder, base.path, quantization)
    left: list[Any] = []
    learn = auto_round_backend._learn

    def spy(*arguments: Any) -> Any:
        left.append(learn(*arguments))
        return left[0]

    monkeypatch.setattr(auto_round_backend, "_learn", spy)
    tuned = auto_round_backend.tune_products(storage, None, list(decoder.linears), FIT[:20])
    return tuned, left[0]


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ({}, {"lora_bias": True}),
        ({"attention_bias": True}, {"bias": "all"}),
        ({"tie_word_embeddings": True}, {"rows": 306}),
        ({"config_class": Gemma3TextConfig, "head_dim": 16}, {"rows": 290, "modules_to_save": ["embed_tokens"]}),
    ],
    ids=["new biases", "biases", "more tokens", "fewer tokens, scaled"],
)
def test_it_learns_on_the_states_that_peft_computes(shape: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    """Biases and rows of the embedding decide the inputs of every product. The head decides none."""
    make_base(tmp_path / "base", **shape)
    trained = train_somewhat(tmp_path / "base", tmp_path / "adapter", **settings)
    base = Base.open(tmp_path / "base")
    model = auto_round_backend._load_merged(base, adapt_decoder(read_decoder(base.config), trained.change), trained.change)
    tokens = torch.tensor([random_tokens(20, 290)])
    with torch.no_grad():
        found = model.base_model(tokens).last_hidden_state
        wanted = trained.model.base_model.model.model(tokens).last_hidden_state
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
