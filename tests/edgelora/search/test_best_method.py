"""compose --method best: the mix that keeps most of the adapters on the rows given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgelora.adapters.folder import Adapter
from edgelora.data.rows import read_rows
from edgelora.in_torch.mixed_model import MixedModel
from edgelora.mix.mix import Mix
from edgelora.search.best_method import METHODS, choose_best_mix
from tests.edgelora.cli.test_cli import call as call  # a fixture
from tests.edgelora.search.test_search import inputs as inputs  # a fixture
from tests.tiny import make_adapter

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgelora.mix.weights import Weight
    from tests.edgelora.cli.test_cli import Result

FACTORS = (1.0, 0.707, 0.5)


def arguments(inputs: dict[str, Any], *more: object) -> list[str]:
    pairs = [("--adapter", f"{name}={inputs['adapters'][name]}:0.8") for name in ("one", "two")]
    pairs += [("--data", f"{name}={inputs['data'][name]}") for name in ("one", "two")]
    return ["compose", *(item for pair in pairs for item in pair), *map(str, more)]


def test_each_mix_is_measured_and_the_one_that_keeps_most_is_chosen(inputs: dict[str, Any]) -> None:
    given: dict[str, tuple[Path | str, Weight]] = {
        "one": (inputs["adapters"]["one"], 0.8),
        "two": (inputs["adapters"]["two"], {"*": 0.8, "*.mlp.*": 0.4}),
    }
    steps: list[tuple[int, int, str]] = []
    data = {name: Path(inputs["data"][name]) for name in given}
    best = choose_best_mix(inputs["base"], given, data, on_progress=lambda *step: steps.append(step))
    assert [(mix.method, mix.factor) for mix in best.tried] == [(method, factor) for method in METHODS for factor in FACTORS]
    assert best.rows == {"one": 16, "two": 16}
    assert steps[-1][0] == steps[-1][1] == len(steps) - 1

    model, opened = MixedModel.open(inputs["base"]), {name: Adapter.open(folder) for name, (folder, _) in given.items()}
    rows = {name: read_rows(path) for name, path in data.items()}
    bare = {name: model.loss(some) for name, some in rows.items()}
    for mix in best.tried[:4]:
        weights: dict[str, Weight] = {
            "one": round(0.8 * mix.factor, 3),
            "two": {"*": round(0.8 * mix.factor, 3), "*.mlp.*": round(0.4 * mix.factor, 3)},
        }
        for name, some in rows.items():
            model.set_mix(Mix({name: opened[name]}, {name: 1.0}))
            alone = model.loss(some)
            model.set_mix(Mix(opened, weights, mix.method))
            assert mix.kept[name] == pytest.approx((bare[name] - model.loss(some)) / (bare[name] - alone), rel=1e-4)
    most = max(best.tried, key=lambda mix: sum(mix.kept.values()))
    assert best.method == most.method
    assert best.weights["one"] == round(0.8 * most.factor, 3)
    assert len({round(mix.mean, 4) for mix in best.tried}) > len(FACTORS), "methods and factors differ"


def test_the_command_writes_the_chosen_mix(call: Callable[..., Result], inputs: dict[str, Any], tmp_path: Path) -> None:
    found = call(*arguments(inputs, "--method", "best", "--base", inputs["base"], "--output", tmp_path / "best"))
    assert found.code == 0, found.err
    first = re.search(r"(\w+), weights × ([\d.]+): keeps ([-\d.]+) \(one [-\d.]+, two [-\d.]+\)", found.err)
    assert first, found.err
    weight = round(0.8 * float(first[2]), 3)
    pairs = [part for name in ("one", "two") for part in ("--adapter", f"{name}={inputs['adapters'][name]}:{weight}")]
    assert call("compose", *pairs, "--method", first[1], "--output", tmp_path / "named").code == 0
    best, named = (Adapter.open(tmp_path / name) for name in ("best", "named"))
    for module in sorted(named.modules):
        np.testing.assert_array_equal(best.dense(module), named.dense(module))


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_adapters_that_no_method_on_factors_can_mix(inputs: dict[str, Any], tmp_path: Path) -> None:
    """DoRA has no factors, and biases add up alone."""
    base, data = inputs["base"], {name: Path(inputs["data"][name]) for name in ("one", "two")}
    kinds: dict[str, tuple[dict[str, Any], list[str]]] = {
        "dora": ({"use_dora": True}, ["linear", "ties"]),
        "biased": ({"lora_bias": True}, ["linear"]),
    }
    for name, (kind, methods) in kinds.items():
        make_adapter(Path(base), tmp_path / name, seed=0, size=0.2, **kind)
        given = {"one": (tmp_path / name, 1.0), "two": (inputs["adapters"]["two"], 1.0)}
        best = choose_best_mix(base, given, data)
        assert list(dict.fromkeys(mix.method for mix in best.tried)) == methods


@pytest.mark.parametrize(
    ("more", "mention"),
    [
        (["--method", "best"], "--method best needs --base"),
        (["--method", "best", "--base", "BASE", "--density", "0.5"], "--density does not go with --method best"),
        (["--method", "best", "--base", "BASE", "--adapter", "three=THREE"], "adapter three has no --data three=ROWS.jsonl"),
        (
            ["--method", "best", "--base", "BASE", "--data", "tow=x.jsonl"],
            "--data tow=… belongs to no adapter; did you mean 'two'?",
        ),
        (["--base", "BASE"], "--data is for --method best"),
    ],
)
def test_wrong_calls(call: Callable[..., Result], inputs: dict[str, Any], tmp_path: Path, more: list[str], mention: str) -> None:
    names = {"BASE": inputs["base"], "three=THREE": f"three={inputs['adapters']['three']}"}
    found = call(*arguments(inputs, *(names.get(item, item) for item in more), "--output", tmp_path / "x"), "--json")
    assert found.code == 2, found.err
    assert mention in found.json["error"]
    assert not (tmp_path / "x").exists()
