"""PEFT's add_weighted_adapter against ours and float64: the two agree where PEFT is right; the tests show where it is not.

PEFT 0.21. Its svd once applied scalings twice, which is fixed; the first adapter's use_rslora still distorts the scale.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from peft import PeftModel

from edgelora.adapters.folder import Adapter
from edgelora.mix.mix import Mix
from tests.tiny import load_base

if TYPE_CHECKING:
    from pathlib import Path

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def adapters(tiny_adapters: dict[str, Path]) -> dict[str, Adapter]:
    return {name: Adapter.open(folder, name) for name, folder in tiny_adapters.items()}


@pytest.fixture
def combine(tiny_base: Path, tiny_adapters: dict[str, Path]) -> Any:
    """A function that combines adapters with PEFT, and returns ΔW by module."""

    def run(weights: dict[str, float], kind: str, **options: Any) -> Any:
        first, *others = weights
        model: Any = PeftModel.from_pretrained(load_base(tiny_base), str(tiny_adapters[first]), adapter_name=first)
        for name in others:
            model.load_adapter(str(tiny_adapters[name]), adapter_name=name)
        model.add_weighted_adapter(list(weights), list(weights.values()), "mix", combination_type=kind, **options)
        return lambda module: model.get_submodule(f"base_model.model.{module}").get_delta_weight("mix").numpy()

    return run


def exact(adapters: dict[str, Adapter], weights: dict[str, float], module: str) -> Any:
    """Σ w·s·B·A in float64."""
    parts = [(weight, *adapters[name].factors(module)) for name, weight in weights.items()]
    return sum(weight * (b.astype(np.float64) @ a.astype(np.float64)) for weight, a, b in parts)


def distance(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def test_cat_agrees(adapters: dict[str, Adapter], combine: Any) -> None:
    """Also with patterns of ranks and alphas, and a rank-stabilized adapter that is not the first."""
    weights = {"patterns": 0.7, "other": -0.4, "rslora": 0.5}
    theirs, ours = combine(weights, "cat"), Mix(adapters, weights)
    for module in ours.modules:
        assert distance(theirs(module), ours.dense(module)) < 1e-5


@pytest.mark.parametrize("rank", [3, 6])
def test_svd_agrees(rank: int, adapters: dict[str, Adapter], combine: Any) -> None:
    weights = {"plain": 0.7, "other": -0.4}
    theirs, ours = combine(weights, "svd", svd_rank=rank), Mix(adapters, weights, "svd")
    for module in (Q, DOWN):
        a, b, _ = ours.factors_with_error(module, rank)
        assert distance(theirs(module), b @ a) < 1e-5


@pytest.mark.parametrize(
    ("kind", "method", "weights"),
    [
        ("ties_svd", "ties", {"plain": 0.6, "other": 0.6}),  # equal and positive: PEFT elects differently otherwise
        ("magnitude_prune_svd", "magnitude", {"plain": 0.6, "other": -0.3}),
    ],
)
def test_methods_on_deltas_agree(
    kind: str, method: str, weights: dict[str, float], adapters: dict[str, Adapter], combine: Any
) -> None:
    """At full rank, so that PEFT truncates nothing."""
    theirs, ours = combine(weights, kind, svd_rank=64, density=0.5), Mix(adapters, weights, method, 0.5)
    for module in (Q, DOWN):
        assert distance(theirs(module), ours.dense(module)) < 1e-4


def test_linear_of_peft_has_cross_terms(adapters: dict[str, Adapter], combine: Any) -> None:
    """PEFT sums A's and B's separately, which multiplies each B with the other adapter's A."""
    weights = {"plain": 0.7, "attention": 0.5}
    theirs = combine(weights, "linear")
    roots = {name: math.sqrt(weight * adapters[name].scale(Q)) for name, weight in weights.items()}
    a = np.sum([root * adapters[name].factors(Q)[0] for name, root in roots.items()], axis=0)
    b = np.sum([root * adapters[name].factors(Q)[1] / adapters[name].scale(Q) for name, root in roots.items()], axis=0)
    assert distance(theirs(Q), b @ a) < 1e-5, "this is what it computes"
    truth = exact(adapters, weights, Q)
    assert distance(theirs(Q), truth) > 0.5
    assert distance(Mix(adapters, weights).dense(Q), truth) < 1e-6


@pytest.mark.parametrize("kind", ["ties", "magnitude_prune"])
def test_methods_of_peft_on_factors_are_not_those_on_deltas(kind: str, adapters: dict[str, Adapter], combine: Any) -> None:
    weights = {"plain": 0.6, "attention": 0.6}
    ours = Mix(adapters, weights, {"magnitude_prune": "magnitude"}.get(kind, kind), 0.5)
    assert distance(combine(weights, kind, density=0.5)(Q), ours.dense(Q)) > 0.5


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_peft_scales_by_the_root_of_the_rank_where_the_first_adapter_is_rank_stabilized(
    kind: str, adapters: dict[str, Adapter], combine: Any
) -> None:
    """The combined adapter gets alpha = r, which means a scale of 1, but also the first one's use_rslora, which makes it √r."""
    weights = {"rslora": 0.7, "plain": 0.4}
    rank = 8
    theirs = combine(weights, kind, **({"svd_rank": rank} if kind == "svd" else {}))
    truth = exact(adapters, weights, Q)
    assert distance(theirs(Q), truth) > 1
    assert distance(theirs(Q), math.sqrt(rank) * truth) < 1e-4
    assert distance(Mix(adapters, weights).dense(Q), truth) < 1e-6
    assert distance(combine(dict(reversed(weights.items())), "cat")(Q), truth) < 1e-5, "so there the order matters"


def test_peft_leaves_an_existing_name_alone_without_a_word(tiny_base: Path, tiny_adapters: dict[str, Path]) -> None:
    model: Any = PeftModel.from_pretrained(load_base(tiny_base), str(tiny_adapters["plain"]), adapter_name="plain")
    model.load_adapter(str(tiny_adapters["other"]), adapter_name="other")
    before = model.get_submodule(f"base_model.model.{Q}").get_delta_weight("other").numpy().copy()
    model.add_weighted_adapter(["plain", "other"], [1.0, 1.0], "other", combination_type="cat")
    np.testing.assert_array_equal(model.get_submodule(f"base_model.model.{Q}").get_delta_weight("other").numpy(), before)
