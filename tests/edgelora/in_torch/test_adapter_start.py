"""What A and B start from, on each form of the base: against float64, and as PEFT and edgelora read what is saved."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight

from edgelora.adapters.folder import Adapter, read_provenance
from edgelora.data.encode_rows import RowEncoder
from edgelora.data.rows import read_rows
from edgelora.in_torch import save_adapter as saving
from edgelora.in_torch import train as training
from edgelora.in_torch.adapter_start import add_adapter, set_start
from edgelora.in_torch.train import load_base, train
from edgelora.in_torch.train_config import TrainConfig
from edgelora_export.base.base import Base
from edgelora_export.weights.torch_model import quiet_libraries
from edgelora_runtime.errors import InputError
from tests.edgelora.in_torch.mean_loss import mean_loss
from tests.tiny import make_base, torch_logits

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

TOKENS = [5, 80, 77, 200, 41, 9, 120, 33]
LAYER = "model.layers.1.self_attn.v_proj"
RANK = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "pissa": {"start": "pissa"},
    "olora": {"start": "olora", "rslora": True},
    "loftq": {"start": "loftq"},
    "eva": {"start": "eva"},
    "gaussian": {"start": "gaussian"},
    "dora": {"dora": True},
    "head": {"modules_to_save": ("lm_head",)},
}
QUICK = (("pissa", "nf4"), ("dora", "int4"), ("head", "none"))  # the others run with the slow tests


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path) -> TrainConfig:
    rows = [{"prompt": f"the {word}\n", "completion": f"{word} sat on the {word}"} for word in ("cat", "day", "sun", "moon")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TrainConfig(
        str(tiny_base), data, tmp_path / "a", "none", rank=RANK, alpha=5.0, lr=1e-2, max_steps=4, batch_size=4, warmup=0.0
    )


def to_float64(tensor: Any) -> NDArray[np.float64]:
    made: NDArray[np.float64] = tensor.detach().double().numpy()
    return made


def read_held(model: Any) -> NDArray[np.float32]:
    """The weight of LAYER (N, K) as training holds it."""
    held: NDArray[np.float32] = dequantize_module_weight(model.get_submodule(LAYER)).detach().float().numpy()
    return held


def first_product(start: str, weight: NDArray[np.float64], stored: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """The product that a start gives, by its paper."""
    if start == "olora":
        q, r = np.linalg.qr(weight)
        product: NDArray[np.float64] = scale * q[:, :RANK] @ r[:RANK]
        return product
    target = weight if start == "pissa" else stored - weight
    u, s, v = np.linalg.svd(target)
    return np.asarray((u[:, :RANK] * s[:RANK]) @ v[:RANK])


@pytest.mark.parametrize("quant", ["nf4", "int4", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
def test_a_start_is_that_of_its_paper(config: TrainConfig, tiny_base: Path, start: str, quant: str) -> None:
    if (start, quant) == ("loftq", "none"):
        with pytest.raises(InputError, match="start = loftq makes up for a quantized base; use quant = nf4 or int4"):
            replace(config, start=start, quant=quant)
        return
    config = replace(config, start=start, quant=quant)
    base = Base.open(tiny_base)
    model, _ = load_base(base, quant)
    weight = read_held(model).astype(np.float64)  # bitsandbytes packs it in another way when it first infers on a CPU
    adapted = add_adapter(config, model)
    set_start(config, adapted, base, None)
    layer = adapted.get_submodule(f"base_model.model.{LAYER}")
    b, a = (to_float64(factor["default"].weight) for factor in (layer.lora_B, layer.lora_A))
    scale = config.alpha / RANK
    expected = first_product(start, weight, base.tensor(f"{LAYER}.weight").astype(np.float64), scale)
    np.testing.assert_allclose(scale * b @ a, expected, atol=1e-5)
    if start != "loftq":  # the run starts from the base, whatever A and B are
        before = torch_logits(load_base(base, quant)[0].eval(), TOKENS)
        np.testing.assert_allclose(torch_logits(adapted.eval(), TOKENS), before, atol=2e-4)


@pytest.mark.parametrize(
    ("settings", "quant"),
    [
        pytest.param(settings, quant, marks=() if (name, quant) in QUICK else pytest.mark.slow, id=f"{name}-{quant}")
        for name, settings in SETTINGS.items()
        for quant in ("nf4", "int4", "none")
        if (settings.get("start"), quant) != ("loftq", "none")  # which TrainConfig refuses
    ],
)
def test_what_is_saved_is_what_training_saw(
    config: TrainConfig, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], quant: str
) -> None:
    """PEFT reads it on the base as training held it, and edgelora computes the change of a layer from it."""
    seen: dict[str, Any] = {}
    save = saving.save_adapter

    def record(model: Any, folder: Path) -> None:
        seen["logits"] = torch_logits(model.eval(), TOKENS)
        layer = model.get_submodule(f"base_model.model.{LAYER}")
        seen["change"] = sum(
            to_float64(layer.lora_B[name].weight) @ to_float64(layer.lora_A[name].weight) * layer.scaling[name]
            for name in layer.active_adapters
        )
        save(model, folder)

    monkeypatch.setattr(training, "save_adapter", record)
    train(replace(config, quant=quant, **settings))
    model, _ = load_base(Base.open(tiny_base), quant)
    held = read_held(model)
    base_logits = torch_logits(model.eval(), TOKENS)
    read: Any = PeftModel.from_pretrained(model, str(config.output)).eval()
    assert np.abs(base_logits - seen["logits"]).max() > 0.05  # it has learned something
    np.testing.assert_allclose(torch_logits(read, TOKENS), seen["logits"], atol=2e-2)  # factors are saved in fp16
    if "dora" not in settings:
        np.testing.assert_allclose(Adapter.open(config.output).dense(LAYER, held), seen["change"], atol=2e-3)
    provenance = read_provenance(config.output)
    assert provenance is not None
    assert provenance.init == settings.get("start", "default")
    stored = json.loads((config.output / "adapter_config.json").read_text(encoding="utf-8"))
    assert provenance.rank == stored["r"]
    assert provenance.alpha == pytest.approx(stored["lora_alpha"])


def test_eva_starts_with_the_directions_of_the_inputs(config: TrainConfig, tiny_base: Path) -> None:
    """The first right singular vectors of what a layer reads where a token is learned from (arXiv 2410.07170)."""
    base = Base.open(tiny_base)
    model, tokenizer = load_base(base, "none")
    config = replace(config, start="eva")
    rows = [RowEncoder(tokenizer).learn(row) for row in read_rows(config.data)]
    length = max(len(row.tokens) for row in rows)
    ids, labels, mask = (
        torch.ones(len(rows), length).long(),
        torch.full((len(rows), length), -100),
        torch.zeros(len(rows), length),
    )
    for place, row in enumerate(rows):
        ids[place, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[place, : len(row.tokens)] = 1
        labels[place, : len(row.tokens)] = torch.tensor(
            [token if learned else -100 for token, learned in zip(row.tokens, row.learned, strict=True)]
        )
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    read: list[Any] = []
    handle = model.get_submodule(LAYER).register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask.long())
    handle.remove()
    with quiet_libraries():
        adapted = add_adapter(config, model)
        set_start(config, adapted, base, [batch])
    a = to_float64(adapted.get_submodule(f"base_model.model.{LAYER}").lora_A["default"].weight)
    inputs = to_float64(read[0][labels != -100])
    _, _, v = np.linalg.svd(inputs - inputs.mean(axis=0), full_matrices=False)  # PEFT takes principal components
    assert np.linalg.norm(a.T @ a - v[:RANK].T @ v[:RANK]) < 0.05  # PEFT's decomposition is a randomized one


def test_a_tied_embedding_that_is_trained_whole_stays_tied(config: TrainConfig, tmp_path: Path) -> None:
    make_base(tmp_path / "tied", tie_word_embeddings=True)
    train(replace(config, base=str(tmp_path / "tied"), modules_to_save=("embed_tokens",), target_modules=("q_proj",)))
    model, _ = load_base(Base.open(tmp_path / "tied"), "none")
    before = model.get_input_embeddings().weight.detach().clone()
    read: Any = PeftModel.from_pretrained(model, str(config.output))
    embedding, head = read.get_input_embeddings().weight, read.get_output_embeddings().weight
    assert (embedding == head).all()
    assert (embedding != before).any()
    assert Adapter.open(config.output).ties_vocab


# --- going on with an adapter -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"dora": True}, marks=pytest.mark.slow),
        {"composable": 2},
        pytest.param({"start": "pissa"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_goes_on_where_an_adapter_ended(config: TrainConfig, tiny_base: Path, settings: dict[str, Any]) -> None:
    train(replace(config, quant="nf4", **settings))
    model, tokenizer = load_base(Base.open(tiny_base), "nf4")
    expected = mean_loss(PeftModel.from_pretrained(model, str(config.output)).eval(), tokenizer, config.data)
    first = TrainConfig(
        config.base,
        config.data,
        config.output.with_name("b"),
        lr=1e-2,
        batch_size=4,
        max_steps=3,
        from_adapter=str(config.output),
    )
    train(first)
    entries = [json.loads(line) for line in (first.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert entries[0]["loss"] == pytest.approx(expected, abs=2e-4)
    assert entries[-1]["loss"] < entries[0]["loss"]
    old, new = Adapter.open(config.output), Adapter.open(first.output)
    assert (new.rank, new.config["lora_alpha"]) == (old.rank, old.config["lora_alpha"])
    if "composable" in settings:
        assert (old.factors(LAYER)[0] == new.factors(LAYER)[0]).all()
        provenance = read_provenance(first.output)
        assert provenance is not None
        assert provenance.init == "composable: slot 2"


def test_what_cannot_go_on_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    make_base(tmp_path / "other", seed=7)
    go_on = replace(config, output=tmp_path / "b", from_adapter=str(config.output))
    with pytest.raises(InputError, match=r"was trained on base .*, whose weights differ from"):
        train(replace(go_on, base=str(tmp_path / "other")))
    with pytest.raises(InputError, match="is not frozen to a slot, so --composable 0 would change it"):
        train(replace(go_on, composable=0))
    with pytest.raises(InputError, match="start = pissa and from_adapter both decide"):
        replace(go_on, start="pissa")
    path = config.output / "adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    with pytest.raises(InputError, match="its start pissa changed the base; save it as plain LoRA first"):
        train(go_on)
