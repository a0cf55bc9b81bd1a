"""A mix is its formula, module by module, and its factors are its delta."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from peft import PeftModel

from edgelora.adapters import Adapter
from edgelora.methods.ties import ties
from edgelora.mix import Mix
from edgelora_runtime.errors import InputError
from tests.tiny import load_base

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = {"plain": 0.6, "other": -0.5, "rslora": 0.3, "patterns": 1.2, "attention": 0.7}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def adapters(tiny_adapters: dict[str, Path]) -> dict[str, Adapter]:
    return {name: Adapter.open(folder, name) for name, folder in tiny_adapters.items()}


@pytest.fixture(scope="module")
def peft_model(tiny_base: Path, tiny_adapters: dict[str, Path]) -> Any:
    """One PEFT model that holds all the adapters."""
    first, *others = tiny_adapters
    model = PeftModel.from_pretrained(load_base(tiny_base), str(tiny_adapters[first]), adapter_name=first)
    for name in others:
        model.load_adapter(str(tiny_adapters[name]), adapter_name=name)
    return model


def peft_delta(model: Any, module: str, adapter: str) -> Any:
    return model.get_submodule(f"base_model.model.{module}").get_delta_weight(adapter).numpy()


def test_linear_is_pefts_cat(adapters: dict[str, Adapter], peft_model: Any) -> None:
    """`cat` is the one combination of PEFT that adds deltas; its `linear` averages A and B apart."""
    weights = {name: WEIGHTS[name] for name in ("plain", "other", "rslora")}
    peft_model.add_weighted_adapter(list(weights), list(weights.values()), "joined", combination_type="cat")
    mix = Mix(adapters, weights)
    for module in mix.modules:
        np.testing.assert_allclose(mix.dense(module), peft_delta(peft_model, module, "joined"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [WEIGHTS, {"attention": 1.0}, {"patterns": -2.0, "attention": 0.1}])
def test_linear_is_the_sum_of_pefts_deltas(weights: dict[str, float], adapters: dict[str, Adapter], peft_model: Any) -> None:
    """Adapters that leave a module alone count as zero there."""
    mix = Mix(adapters, weights)
    assert mix.modules == set().union(*(adapters[name].modules for name in weights))
    for module in mix.modules:
        parts = [w * peft_delta(peft_model, module, n) for n, w in weights.items() if module in adapters[n].modules]
        np.testing.assert_allclose(mix.dense(module), np.sum(parts, axis=0), rtol=1e-4, atol=1e-6)


def test_linear_factors_are_exact(adapters: dict[str, Adapter]) -> None:
    mix = Mix(adapters, WEIGHTS)
    for module in mix.modules:
        a, b, error = mix.factors_with_error(module)
        assert error == 0
        assert (
            len(a)
            == b.shape[1]
            == mix.rank(module)
            == sum(adapters[name].shapes[module][2] for name in WEIGHTS if module in adapters[name].modules)
        )
        np.testing.assert_allclose(b @ a, mix.dense(module), rtol=1e-4, atol=1e-6)


def test_ties_is_ties_on_the_deltas(adapters: dict[str, Adapter], peft_model: Any) -> None:
    weights = {"plain": 0.7, "rslora": 0.5}
    mix = Mix(adapters, weights, "ties", 0.3)
    for module in (Q, DOWN):
        expected = ties([peft_delta(peft_model, module, name) for name in weights], list(weights.values()), density=0.3)
        found = mix.dense(module)
        assert (np.abs(found - expected) > 1e-5).mean() < 0.001, "but for entries at the edge of the density"


def test_ties_factors_are_the_best_of_their_rank(adapters: dict[str, Adapter]) -> None:
    mix = Mix(adapters, {"plain": 1.0, "other": 1.0}, "ties", 0.5)
    a, b, error = mix.factors_with_error(Q)
    assert len(a) == mix.rank(Q) == 6
    dense = mix.dense(Q)
    assert 0 < error < 1
    assert np.linalg.norm(dense - b @ a) / np.linalg.norm(dense) == pytest.approx(error, rel=1e-3)


def test_one_adapter_at_weight_1_is_itself(adapters: dict[str, Adapter]) -> None:
    for name, adapter in adapters.items():
        for method in ("linear", "ties"):
            mix = Mix(adapters, {name: 1.0}, method, 1.0)
            for module in adapter.modules:
                np.testing.assert_allclose(mix.dense(module), adapter.dense(module), rtol=1e-6, atol=1e-7)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"method": "median"}, "median.*linear, svd, ties"),
    "unknown adapters": ({"weights": {"x": 1.0, "y": 1.0}}, "x, y"),
    "not a number": ({"weights": {"plain": float("nan")}}, "plain = nan"),
    "infinite": ({"weights": {"plain": float("inf"), "other": float("-inf")}}, "plain = inf.*other = -inf"),
    "density 0": ({"density": 0.0}, "density"),
    "density over 1": ({"density": 1.5}, "density"),
}


@pytest.mark.parametrize(("settings", "mention"), WRONG.values(), ids=WRONG.keys())
def test_wrong_mixes_are_refused(settings: dict[str, Any], mention: str, adapters: dict[str, Adapter]) -> None:
    with pytest.raises(InputError, match=mention):
        Mix(adapters, **{"weights": {"plain": 1.0}, **settings})
