"""The trained base matches bitsandbytes, and the better base for merging is the one with the lower loss in transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from edgelora.adapters.folder import Adapter, Provenance, write_provenance
from edgelora.composing.compose import compose
from edgelora.data.calibration import hash_data
from edgelora.exporting import trained_base
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora.exporting.trained_base import find_quantization, read_trained_base
from edgelora.in_torch.train import load_base as load_training_base
from edgelora.mix.mix import Mix
from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.bundle.gate import Gate
from edgelora_export.plan.variants import Quantization
from edgelora_runtime import Runtime
from edgelora_runtime.bundle.tokenizer import TOKENIZER, load_tokenizer
from edgelora_runtime.errors import InputError, MissingExtraError
from tests.tiny import ATTENTION, load_base, make_adapter, random_tokens, torch_logits

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

WORDS = ("cat", "day", "sun", "moon", "mat", "one")
SURE = Gate(retention=-1e6)


def write_rows(path: Path) -> Path:
    rows = [{"prompt": f"the {word} {other}", "completion": f" and {other} {word}"} for word in WORDS for other in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_trained(base: Path, folder: Path, held: str, data: Path | None = None, **settings: Any) -> Path:
    """An adapter whose edgelora.json records the base's quantization."""
    make_adapter(base, folder, **settings)
    write_provenance(
        folder,
        Provenance(
            "tiny",
            Base.open(base).sha256,
            held,
            hash_data(data) if data else "",
            len(WORDS) ** 2,
            "default",
            0,
            4,
            8.0,
            1,
            1e-3,
            data_file=str(data or ""),
        ),
    )
    return folder


def held_by_training(base: Path, quant: str) -> Any:
    """The model of training, with its 4-bit weights dequantized by bitsandbytes to float32."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    held, _ = load_training_base(Base.open(base), quant)
    plain = load_base(base)
    for name, module in held.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None:
            spelled = dequantize_4bit(weight.data, weight.quant_state) if isinstance(module, Linear4bit) else weight.data
            plain.get_submodule(name).weight.data.copy_(spelled)
    return plain


@pytest.mark.parametrize("quant", ["nf4", "int4"])
def test_both_changes_give_the_weights_of_training(tiny_base: Path, tmp_path: Path, quant: str) -> None:
    """The unmerged change covers all modules, the merged one those of the mix."""
    adapter = Adapter.open(make_trained(tiny_base, tmp_path / "a", quant, target_modules=list(ATTENTION)))
    base, mix = Base.open(tiny_base), Mix({"a": adapter}, {"a": 0.7})
    quantization = find_quantization(mix)
    assert quantization == quant
    trained = read_trained_base(mix, quantization, read_decoder(base.config))
    model = held_by_training(tiny_base, quant)
    held = {name.removesuffix(".weight"): value.numpy().copy() for name, value in model.state_dict().items()}
    adapted: Any = PeftModel.from_pretrained(model, adapter.folder).base_model
    seen = set()
    for module, spelled in held.items():
        weight = base.tensor(f"{module}.weight")
        tuned = spelled
        if module in adapter.modules:
            tuned = spelled + 0.7 * adapted.get_submodule(f"model.{module}").get_delta_weight("default").detach().numpy()
            merged = weight + trained.merged.dense(module, weight)
            assert np.abs(merged - tuned).max() <= 2e-6, module
        ours = weight + trained.unmerged.dense(module, weight) if module in trained.unmerged.modules else weight
        assert np.abs(ours - tuned).max() <= 2e-6, module
        if np.abs(spelled - weight).max() > 1e-3:
            seen.add(module)
    assert trained.merged.modules == adapter.modules
    assert len(seen) == (16 if quant == "int4" else 14), "int4 rounds embedding and head as well"


def test_dora_is_brought_to_its_norms_on_the_held_weights(tiny_base: Path, tmp_path: Path) -> None:
    folder = make_trained(tiny_base, tmp_path / "a", "nf4", use_dora=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    rng = np.random.default_rng(0)
    save_file(
        {key: value * rng.uniform(0.8, 1.2, value.shape).astype(np.float32) for key, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    adapter, base, module = Adapter.open(folder), Base.open(tiny_base), "model.layers.1.mlp.down_proj"
    mix = Mix({"a": adapter}, {"a": 1.0})
    weight = base.tensor(f"{module}.weight")
    ours = weight + read_trained_base(mix, "nf4", read_decoder(base.config)).merged.dense(module, weight)
    tensors = {key: value.astype(np.float64) for key, value in load_file(folder / "adapter_model.safetensors").items()}
    a, b, magnitude = (
        tensors[f"base_model.model.{module}.{part}"] for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    )
    sum_ = held_by_training(tiny_base, "nf4").get_submodule(module).weight.detach().numpy() + 2.0 * b @ a
    expected = sum_ * (magnitude / np.linalg.norm(sum_, axis=1))[:, None]
    assert np.abs(ours - expected).max() <= 1e-5


@pytest.fixture(scope="module")
def held_adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of every origin, with data to judge on where needed."""
    root = tmp_path_factory.mktemp("held")
    data = write_rows(root / "rows.jsonl")
    return {
        "nf4": make_trained(tiny_base, root / "nf4", "nf4", data),
        "more": make_trained(tiny_base, root / "more", "nf4", data, seed=9),
        "int4": make_trained(tiny_base, root / "int4", "int4", data, seed=2),
        "float": make_trained(tiny_base, root / "float", "none", data, seed=3),
        "blind": make_trained(tiny_base, root / "blind", "nf4", seed=4),
    }


def torch_loss(model: Any, base: Path, rows: list[dict[str, str]]) -> float:
    """The mean cross entropy of the rows' completions."""
    tokenizer = load_tokenizer((base / TOKENIZER).read_bytes())
    losses = []
    for row in rows:
        prompt, whole = (tokenizer.encode(text).ids for text in (row["prompt"], row["prompt"] + row["completion"]))
        assert whole[: len(prompt)] == prompt
        logits = torch.from_numpy(torch_logits(model, whole)).double()[len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(whole[len(prompt) :]), reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("quant", ["nf4", "int4"])
def test_the_base_with_the_lower_loss_is_chosen(
    tiny_base: Path, held_adapters: dict[str, Path], tmp_path: Path, quant: str
) -> None:
    """Losses and divergences are PEFT's, on the float base and on the trained base."""
    variants = {
        "chosen": VariantRecipe({"a": 1.0}),
        "floating": VariantRecipe({"a": 1.0}, merge_base="float"),
        "held": VariantRecipe({"a": 1.0}, merge_base="trained"),
        "alive": VariantRecipe({"a": 1.0}, "live"),
    }
    recipe = Recipe(str(tiny_base), {"a": held_adapters[quant]}, variants, Quantization(bits=32), gate=SURE)
    manifest = export(recipe, tmp_path / "bundle")
    floating = PeftModel.from_pretrained(load_base(tiny_base), held_adapters[quant]).eval()
    held = PeftModel.from_pretrained(held_by_training(tiny_base, quant), held_adapters[quant]).eval()
    rows = held_out_rows(held_adapters[quant].parent / "rows.jsonl")
    chosen = manifest.variants["chosen"]
    assert chosen.merge_losses["float"] == pytest.approx(torch_loss(floating, tiny_base, rows), rel=1e-4)
    if quant == "nf4":  # int4 training rounds the ends, too, which a merge leaves to the export's own quantization
        assert chosen.merge_losses["trained"] == pytest.approx(torch_loss(held, tiny_base, rows), rel=1e-4)
    assert chosen.merge_base == min(chosen.merge_losses, key=lambda name: chosen.merge_losses[name])
    assert [manifest.variants[name].merge_base for name in ("floating", "held", "alive")] == ["float", "trained", "float"]
    assert {manifest.variants[name].trained_on for name in ("floating", "held", "alive")} == {quant}
    assert all(not manifest.variants[name].merge_losses for name in ("floating", "held", "alive"))
    tokens = random_tokens(30, seed=4)
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        if quant == "nf4":
            assert np.abs(runtime.logits(tokens, variant="held") - torch_logits(held, tokens)).max() <= 2e-3
        assert np.abs(runtime.logits(tokens, variant="floating") - torch_logits(floating, tokens)).max() <= 2e-3
    found = {name: entry.fidelity for name, entry in manifest.variants.items()}
    assert all(entry is not None and entry.trained_kl is not None for entry in found.values())
    apart = divergence(held, floating, tiny_base, rows)
    assert apart > 1e-3
    for name in ("floating", "alive"):
        assert found[name].trained_kl == pytest.approx(apart, rel=1e-2)  # type: ignore[union-attr]
        assert found[name].kl_mean < 1e-6  # type: ignore[union-attr]
    if quant == "nf4":
        assert found["held"].trained_kl < 1e-6  # type: ignore[union-attr, operator]
        assert found["held"].kl_mean == pytest.approx(divergence(floating, held, tiny_base, rows), rel=1e-2)  # type: ignore[union-attr]


def held_out_rows(path: Path) -> list[dict[str, str]]:
    """The rows that gather_calibration holds out: every eighth shuffled row."""
    import random

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    random.Random(f"0 {len(rows)}").shuffle(rows)
    return rows[::8]


def divergence(teacher: Any, student: Any, base: Path, rows: list[dict[str, str]]) -> float:
    tokenizer = load_tokenizer((base / TOKENIZER).read_bytes())
    found = []
    for row in rows:
        start = len(tokenizer.encode(row["prompt"]).ids)
        whole = tokenizer.encode(row["prompt"] + row["completion"]).ids
        wanted, said = (
            torch.from_numpy(torch_logits(model, whole)).double()[start - 1 : -1].log_softmax(-1) for model in (teacher, student)
        )
        found.append((wanted.exp() * (wanted - said)).sum(-1))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize(
    "mix",
    [{"float": 1.0}, {"nf4": 0.5, "int4": 0.5}, {"nf4": 0.5, "float": 0.5}, {"blind": 1.0}],
    ids=["none", "4", "0", "blind"],
)
def test_auto_is_float_where_there_is_no_choice(
    tiny_base: Path, held_adapters: dict[str, Path], tmp_path: Path, mix: dict[str, float]
) -> None:
    recipe = Recipe(str(tiny_base), held_adapters, {"v": VariantRecipe(mix)}, Quantization(bits=32), gate=SURE)
    variant = export(recipe, tmp_path / "bundle").variants["v"]
    assert (variant.merge_base, variant.merge_losses) == ("float", {})


def test_an_adapter_of_unknown_origin_has_no_trained_base(
    tiny_base: Path, tiny_adapters: dict[str, Path], held_adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapters = {"a": tiny_adapters["plain"], "b": held_adapters["nf4"]}
    assert find_quantization(Mix({name: Adapter.open(path) for name, path in adapters.items()}, {"a": 1.0, "b": 1.0})) is None
    recipe = Recipe(str(tiny_base), adapters, {"v": VariantRecipe({"a": 1.0}, merge_base="trained")}, Quantization(bits=32))
    with pytest.raises(InputError, match=r"variant v: merge_base = 'trained', and edgelora\.json names no"):
        export(recipe, tmp_path / "bundle")
    export(replace(recipe, variants={"v": VariantRecipe({"a": 1.0}, "live")}, merge_base="trained"), tmp_path / "bundle")


def test_without_bitsandbytes_auto_is_float_and_says_so(
    tiny_base: Path, held_adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained_base, "find_spec", lambda name: None)
    notes: list[str] = []
    recipe = Recipe(str(tiny_base), held_adapters, {"v": VariantRecipe({"nf4": 1.0})}, Quantization(bits=32), gate=SURE)
    variant = export(recipe, tmp_path / "bundle", on_note=notes.append).variants["v"]
    assert variant.merge_base == "float" and variant.fidelity is not None and variant.fidelity.trained_kl is None
    assert len(notes) == 1 and notes[0].startswith("v: without bitsandbytes")
    with pytest.raises(MissingExtraError, match="bitsandbytes"):
        export(replace(recipe, merge_base="trained"), tmp_path / "bundle")


def test_a_composed_adapter_knows_its_base_only_if_its_adapters_agree(held_adapters: dict[str, Path], tmp_path: Path) -> None:
    for other, held in (("more", "nf4"), ("int4", "mixed")):
        compose({"a": (held_adapters["nf4"], 1.0), "b": (held_adapters[other], 1.0)}, tmp_path / other)
        provenance = Adapter.open(tmp_path / other).provenance
        assert provenance is not None and provenance.base_quantization == held
