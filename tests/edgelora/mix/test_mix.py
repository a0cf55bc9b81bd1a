"""A mix matches its formula, module by module, and its factors match its delta."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from peft import PeftModel

from edgelora.adapters.folder import Adapter
from edgelora.mix.methods import MIX_METHODS
from edgelora.mix.methods.ties import ties
from edgelora.mix.mix import Mix
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
    """A PEFT model with all the adapters."""
    first, *others = tiny_adapters
    model = PeftModel.from_pretrained(load_base(tiny_base), str(tiny_adapters[first]), adapter_name=first)
    for name in others:
        model.load_adapter(str(tiny_adapters[name]), adapter_name=name)
    return model


def peft_delta(model: Any, module: str, adapter: str) -> Any:
    return model.get_submodule(f"base_model.model.{module}").get_delta_weight(adapter).numpy()


@pytest.mark.parametrize("weights", [WEIGHTS, {"attention": 1.0}, {"patterns": -2.0, "attention": 0.1}])
def test_linear_is_the_sum_of_pefts_deltas(weights: dict[str, float], adapters: dict[str, Adapter], peft_model: Any) -> None:
    """Adapters without a module count as zero there."""
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


@pytest.mark.parametrize("method", sorted(MIX_METHODS.keys() - {"core_iso", "iso_c"}))
def test_one_adapter_at_weight_1_is_itself(method: str, adapters: dict[str, Adapter], peft_model: Any) -> None:
    """As PEFT computes it: plain, rank-stabilized, with patterns. Iso is left out: it flattens even one adapter's spectrum."""
    for name, adapter in adapters.items():
        mix = Mix(adapters, {name: 1.0}, method, 1.0)
        for module in adapter.modules:
            np.testing.assert_allclose(mix.dense(module), peft_delta(peft_model, module, name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", sorted(MIX_METHODS.keys() - {"dare_linear", "dare_ties"}))
def test_w_and_minus_w_cancel(method: str, adapters: dict[str, Adapter]) -> None:
    """For each kind of adapter. DARE is left out, as it drops different entries of each."""
    for adapter in adapters.values():
        mix = Mix({"a": adapter, "b": adapter}, {"a": 0.7, "b": -0.7}, method, 0.4)
        for module in (Q, "model.layers.1.self_attn.k_proj"):
            assert np.abs(mix.dense(module)).max() <= 1e-6 * np.abs(adapter.dense(module)).max()


@pytest.mark.parametrize("method", MIX_METHODS)
def test_order_does_not_change_a_bit(method: str, adapters: dict[str, Adapter]) -> None:
    forward, backward = (Mix(adapters, dict(items), method, 0.4) for items in (WEIGHTS.items(), reversed(WEIGHTS.items())))
    for module in (Q, DOWN):
        np.testing.assert_array_equal(forward.dense(module), backward.dense(module))
        for found, other in zip(forward.factors(module), backward.factors(module), strict=True):
            np.testing.assert_array_equal(found, other)


@pytest.mark.parametrize("method", MIX_METHODS)
def test_factors_are_the_dense_delta(method: str, adapters: dict[str, Adapter]) -> None:
    """Within the stated error. After truncation, that is the error of the discarded singular values."""
    mix = Mix(adapters, WEIGHTS, method, 0.4, 3)
    for module in (Q, DOWN):
        dense = mix.dense(module).astype(np.float64)
        singular = np.linalg.svd(dense, compute_uv=False)
        for rank in (None, 1, 5, 200):
            a, b, error = mix.factors_with_error(module, rank)
            assert a.dtype == b.dtype == np.float32
            assert len(a) == b.shape[1] <= (rank or mix.rank(module))
            assert np.linalg.norm(dense - b.astype(np.float64) @ a) / np.linalg.norm(dense) == pytest.approx(error, abs=1e-6)
            assert error == pytest.approx(np.linalg.norm(singular[len(a) :]) / np.linalg.norm(singular), abs=1e-6)
            if MIX_METHODS[method].factored:
                assert len(a) <= mix.rank(module)
                assert rank in (1, 5) or error == 0


def test_methods_on_factors_are_those_on_deltas(adapters: dict[str, Adapter]) -> None:
    for method, twin in (("core_tsv", "tsv"), ("core_iso", "iso_c"), ("svd", "linear")):
        for module in (Q, DOWN):
            expected = Mix(adapters, WEIGHTS, twin).dense(module)
            size = np.abs(expected).max()
            np.testing.assert_allclose(Mix(adapters, WEIGHTS, method).dense(module), expected, atol=1e-4 * size)


def test_merged_factors_are_kept_as_far_as_there_is_room(adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass of an export asks for them again, and finding them takes longer than the pass."""
    pair = {"plain": 0.7, "other": 0.7}
    mix, opened, read = Mix(adapters, pair, "core_tsv"), [], Adapter.factors

    def read_and_note(adapter: Adapter, module: str) -> Any:
        opened.append(module)
        return read(adapter, module)

    monkeypatch.setattr(Adapter, "factors", read_and_note)
    first = {module: mix.factors(module) for module in (Q, DOWN)}
    monkeypatch.setattr("edgelora.mix.mix._KEPT_BYTES", sum(part.nbytes for part in first[Q]))
    tight = Mix(adapters, pair, "core_tsv")
    for module in (Q, DOWN, Q, DOWN):
        np.testing.assert_array_equal(mix.dense(module), first[module][1] @ first[module][0])
        np.testing.assert_array_equal(tight.dense(module), mix.dense(module))
    assert opened == [Q, Q, DOWN, DOWN, Q, Q, *[DOWN] * 4]


def test_dropped_entries_depend_only_on_seed_adapter_and_module(adapters: dict[str, Adapter]) -> None:
    def dense(module: str, seed: int, *names: str) -> Any:
        return Mix(adapters, dict.fromkeys(names, 1.0), "dare_linear", 0.3, seed).dense(module)

    one, other = dense(Q, 0, "plain"), dense(Q, 0, "rslora")
    np.testing.assert_allclose(dense(Q, 0, "rslora", "plain"), one + other, atol=1e-6)
    kept = one != 0
    assert ((dense(Q, 1, "plain") != 0) != kept).any()
    assert ((other != 0) != kept).any()
    assert ((dense(Q.replace("0", "1"), 0, "plain") != 0) != kept).any()


def test_weights_by_module(adapters: dict[str, Adapter]) -> None:
    """The last matching pattern wins; without one, the weight is 0."""
    by_module = {"*": 0.6, "model.layers.0.*": 0.2, "*.mlp.*": -0.1}
    mix = Mix(adapters, {"plain": by_module, "other": {"*.q_proj": 2.0}})
    assert [mix.weight("plain", module) for module in (Q, DOWN, Q.replace("0", "1"))] == [0.2, -0.1, 0.6]
    np.testing.assert_allclose(
        mix.dense(Q), 0.2 * adapters["plain"].dense(Q) + 2 * adapters["other"].dense(Q), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(mix.dense(DOWN), Mix(adapters, {"plain": -0.1}).dense(DOWN))
    assert (mix.rank(Q), mix.rank(DOWN)) == (6, 4)
    assert mix.describe() == "linear({*: 0.6, model.layers.0.*: 0.2, *.mlp.*: -0.1} plain + {*.q_proj: 2} other)"
    assert Mix(adapters, {"plain": 0.6}, "dare_ties", 0.3, 7).describe() == "dare_ties(0.6 plain, density 0.3, seed 7)"


def test_modules_are_those_that_some_weight_changes(adapters: dict[str, Adapter]) -> None:
    mix = Mix(adapters, {"plain": {"*.k_proj": 0.5, "*.layers.1.*": 0.0}, "other": 0.0})
    assert mix.modules == {"model.layers.0.self_attn.k_proj"}
    assert Mix(adapters, {"plain": 0.0}).modules == set()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"method": "median"}, "median.*linear, svd, ties"),
    "unknown adapters": ({"weights": {"x": 1.0, "y": 1.0}}, "x, y"),
    "not a number": ({"weights": {"plain": float("nan")}}, "plain = nan"),
    "infinite": ({"weights": {"plain": float("inf"), "other": float("-inf")}}, "plain = inf.*other = -inf"),
    "a pattern's weight": ({"weights": {"plain": {"*": float("nan")}}}, 'plain."\\*" = nan'),
    "no pattern": ({"weights": {"plain": {}}}, "plain = {} is empty"),
    "a pattern that matches nothing": (
        {"weights": {"plain": {"*": 1, "model.layer.*": 2}}},
        "plain: no module matches model.layer",
    ),
    "negative seed": ({"seed": -1}, "seed = -1"),
    "density 0": ({"density": 0.0}, "density"),
    "density over 1": ({"density": 1.5}, "density"),
}


@pytest.mark.parametrize(("settings", "mention"), WRONG.values(), ids=WRONG.keys())
def test_wrong_mixes_are_refused(settings: dict[str, Any], mention: str, adapters: dict[str, Adapter]) -> None:
    with pytest.raises(InputError, match=mention):
        Mix(adapters, **{"weights": {"plain": 1.0}, **settings})


def test_ranks_below_1_are_refused(adapters: dict[str, Adapter]) -> None:
    with pytest.raises(InputError, match="rank = 0"):
        Mix(adapters, {"plain": 1.0}).factors_with_error(Q, 0)
