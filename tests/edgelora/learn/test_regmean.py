"""RegMean against its formula in float64, on inputs recorded in transformers and PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Qwen2Config

from edgelora.adapters.folder import Adapter
from edgelora.learn.regmean import RIDGE, solve_regmean
from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.plan.calibration import Sample
from tests.tiny import ATTENTION, make_adapter, make_base

if TYPE_CHECKING:
    from pathlib import Path

SAMPLES = {
    name: [Sample(tuple(int(token) for token in np.random.default_rng([seed, place]).integers(2, 300, 40))) for place in range(3)]
    for seed, name in enumerate(("one", "two"))
}


def collect_inputs(base: Path, adapter: Path, samples: list[Sample]) -> dict[str, np.ndarray[Any, Any]]:
    """XᵀX / T by module, float64, recorded in PEFT's model."""
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    seen: dict[str, list[Any]] = {}

    def watch(name: str) -> Any:
        return lambda module, inputs: seen.setdefault(name, []).append(inputs[0][0].double().numpy())

    for name, module in model.base_model.model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(watch(name))
    with torch.inference_mode():
        for sample in samples:
            model(input_ids=torch.tensor([sample.tokens]))
    stacked = {name: np.concatenate(pieces) for name, pieces in seen.items()}
    return {name: rows.T @ rows / len(rows) for name, rows in stacked.items()}


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A base with heads of width 12, which the graph pads, with an adapter on all linear layers and one on attention."""
    folder = tmp_path_factory.mktemp("padded")
    make_base(folder / "base", config_class=Qwen2Config, hidden_size=48)
    make_adapter(folder / "base", folder / "one")
    make_adapter(folder / "base", folder / "two", seed=3, r=2, target_modules=list(ATTENTION))
    return folder / "base", {"one": folder / "one", "two": folder / "two"}


def test_factors_are_those_of_the_formula(padded: tuple[Path, dict[str, Path]]) -> None:
    base, folders = padded
    adapters = {name: Adapter.open(folder) for name, folder in folders.items()}
    opened = Base.open(base)
    found = solve_regmean(opened, read_decoder(opened.config), adapters, SAMPLES)
    assert set(found) == set(adapters["one"].modules)
    moments = {name: collect_inputs(base, folders[name], SAMPLES[name]) for name in adapters}
    for module, factors in found.items():
        assert set(factors) == {name for name, adapter in adapters.items() if module in adapter.modules}
        own = {name: moments[name][module] for name in adapters}
        own = {name: g + np.eye(len(g)) * RIDGE * np.trace(g) / len(g) for name, g in own.items()}
        wanted = sum(adapters[name].dense(module).astype(np.float64) @ own[name] for name in factors) @ np.linalg.inv(
            own["one"] + own["two"]
        )
        got = sum(b.astype(np.float64) @ a for a, b in factors.values())
        assert np.linalg.norm(got - wanted) < 1e-3 * np.linalg.norm(wanted), module


def test_one_adapter_stays_itself(padded: tuple[Path, dict[str, Path]]) -> None:
    base, folders = padded
    adapter, opened = Adapter.open(folders["one"]), Base.open(base)
    for module, factors in solve_regmean(opened, read_decoder(opened.config), {"one": adapter}, SAMPLES).items():
        a, b = factors["one"]
        np.testing.assert_allclose(b @ a, adapter.dense(module), atol=1e-5)
