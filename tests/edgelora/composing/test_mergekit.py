"""mergekit configurations against the same merge of whole models by hand, minus the base; and refused configurations."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from peft import PeftModel

from edgelora.adapters.folder import Adapter
from edgelora.composing.compose import compose_mergekit
from edgelora.composing.mergekit_config import parse_mergekit, read_mergekit
from edgelora.composing.mergekit_mix import MergekitMix
from edgelora_runtime.errors import InputError
from tests.tiny import load_base

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Doubles = NDArray[np.float64]

# Both layers; "attention" does not change the MLPs.
Q0, Q1, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"
NAMES = ("plain", "other", "attention")


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tiny_adapters: dict[str, Path]) -> dict[str, dict[str, Doubles]]:
    """mergekit's inputs: the weights of the base, and of the base with each adapter merged into it by PEFT."""
    models = {"base": load_base(tiny_base)}
    for name in NAMES:
        models[name] = PeftModel.from_pretrained(load_base(tiny_base), str(tiny_adapters[name])).merge_and_unload()
    return {
        name: {module: model.get_submodule(module).weight.detach().double().numpy() for module in (Q0, Q1, DOWN1)}
        for name, model in models.items()
    }


@pytest.fixture
def configure(tiny_base: Path, tiny_adapters: dict[str, Path]) -> Any:
    """A configuration, as parsed from YAML, from parameters per model."""

    def make(method: str, models: dict[str, Any], **others: Any) -> dict[str, Any]:
        entries = [
            {"model": f"{tiny_base}+{tiny_adapters[name]}" if name != "base" else str(tiny_base), "parameters": parameters}
            for name, parameters in models.items()
        ]
        base = {} if method == "linear" else {"base_model": str(tiny_base)}
        return {"merge_method": method, "models": entries, **base, **others}

    return make


def merge(value: dict[str, Any], module: str, seed: int = 0) -> Doubles:
    return MergekitMix.open(parse_mergekit(value), seed).dense(module).astype(np.float64)


def by_hand(
    whole: dict[str, dict[str, Doubles]],
    module: str,
    weights: dict[str, float],
    *,
    density: dict[str, float] | None = None,
    elect: bool = False,
    normalize: bool = False,
    factor: float = 1.0,
) -> Doubles:
    """Generalized task arithmetic, entry by entry, on whole models in float64.

    As in https://github.com/arcee-ai/mergekit/blob/a6e402884ba9bc30da7f23e8304a35f19485de95/mergekit/merge_methods/generalized_task_arithmetic.py
    and sparsify.py beside merge_methods: the largest int(density · size) entries of each difference are kept.
    """
    base = whole["base"][module]
    parts = []
    for name, weight in weights.items():
        delta = whole[name][module] - base
        if density and density[name] < 1:
            order = np.argsort(-np.abs(delta), axis=None, kind="stable")
            delta = delta.copy()
            delta.flat[order[int(density[name] * delta.size) :]] = 0
        parts.append((weight, delta))
    result = np.zeros_like(base)
    for at in np.ndindex(base.shape):
        votes = [(weight, weight * delta[at]) for weight, delta in parts]
        if elect:
            sign = 1 if sum(vote for _, vote in votes) >= 0 else -1
            votes = [(weight, vote) for weight, vote in votes if np.sign(vote) == sign]
        divisor = sum(weight for weight, _ in votes) if normalize else 1
        result[at] = factor * sum(vote for _, vote in votes) / (divisor or 1)
    return result


def assert_near(found: Doubles, expected: Doubles, *, but: float = 0.0) -> None:
    """Compares all entries except for a share at the edge of a density or an election, where float32 may decide differently."""
    assert np.abs(expected).max() > 0.001
    assert (np.abs(found - expected) > 1e-5).mean() <= but


@pytest.mark.parametrize("module", [Q0, DOWN1])
def test_linear_over_whole_models(module: str, whole: dict[str, dict[str, Doubles]], configure: Any) -> None:
    """Σ w·W / Σ w, with the base's share, minus the base. In modules that it does not change, an adapter counts as the base."""
    weights = {"plain": 0.5, "other": 0.8, "attention": 0.4, "base": 0.3}
    found = merge(configure("linear", {name: {"weight": weight} for name, weight in weights.items()}), module)
    mean = sum(weight * whole[name][module] for name, weight in weights.items()) / sum(weights.values())
    assert_near(found, mean - whole["base"][module])


def test_linear_without_normalize_needs_weights_that_sum_to_1(whole: dict[str, dict[str, Doubles]], configure: Any) -> None:
    value = configure("linear", {"plain": {"weight": 1.3}, "other": {"weight": -0.3}}, parameters={"normalize": False})
    assert_near(merge(value, Q0), 1.3 * whole["plain"][Q0] - 0.3 * whole["other"][Q0] - whole["base"][Q0])
    value["models"][0]["parameters"]["weight"] = 1.0
    with pytest.raises(InputError, match=r"sum to 0.7 .*task_arithmetic"):
        merge(value, Q0)


def test_linear_takes_in_the_base_that_it_is_given(whole: dict[str, dict[str, Doubles]], configure: Any, tiny_base: Path) -> None:
    """mergekit adds base_model to the models with the shared weight. Without a weight it stops, and so does edgelora."""
    value = configure("linear", {"plain": {"weight": 0.5}, "other": {}}, base_model=str(tiny_base), parameters={"weight": 1.5})
    expected = (0.5 * whole["plain"][Q0] + 1.5 * whole["other"][Q0] + 1.5 * whole["base"][Q0]) / 3.5
    assert_near(merge(value, Q0), expected - whole["base"][Q0])
    value = configure("linear", {"plain": {"weight": 0.5}}, base_model=str(tiny_base))
    with pytest.raises(InputError, match="the base has no weight"):
        merge(value, Q0)


@pytest.mark.parametrize("module", [Q0, DOWN1])
@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic(normalize: bool, module: str, whole: dict[str, dict[str, Doubles]], configure: Any) -> None:
    weights = {"plain": 0.5, "other": -0.8, "attention": 1.4}
    models = {name: {"weight": weight} for name, weight in weights.items()}
    value = configure("task_arithmetic", models, parameters={"normalize": normalize, "lambda": 0.7})
    assert_near(merge(value, module), by_hand(whole, module, weights, normalize=normalize, factor=0.7))


@pytest.mark.parametrize("normalize", [None, False])
@pytest.mark.parametrize("weights", [(0.5, 0.8, 0.6), (0.5, -0.8, 0.2)])
def test_ties(weights: tuple[float, ...], normalize: bool | None, whole: dict[str, dict[str, Doubles]], configure: Any) -> None:
    """A density per model, the mean by weight unless normalize is off, λ, and negative weights."""
    given, density = dict(zip(NAMES, weights, strict=True)), dict(zip(NAMES, (0.3, 0.6, 1.0), strict=True))
    models = {name: {"weight": given[name], "density": density[name]} for name in NAMES}
    parameters = {"lambda": 1.2, "int8_mask": True} | ({} if normalize is None else {"normalize": normalize})
    for module in (Q0, DOWN1):
        found = merge(configure("ties", models, parameters=parameters), module)
        expected = by_hand(whole, module, given, density=density, elect=True, normalize=normalize is None, factor=1.2)
        assert_near(found, expected, but=0.002)


def test_ties_rescaled_keeps_the_sum_of_magnitudes(whole: dict[str, dict[str, Doubles]], configure: Any) -> None:
    value = configure("ties", {"plain": {"weight": 1, "density": 0.3}}, parameters={"rescale": True})
    found, delta = merge(value, Q0), whole["plain"][Q0] - whole["base"][Q0]
    assert np.count_nonzero(found) == int(0.3 * delta.size)
    assert np.abs(found).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-4)
    kept = found != 0
    np.testing.assert_allclose(found[kept] / delta[kept], np.abs(delta).sum() / np.abs(delta[kept]).sum(), rtol=1e-2)


@pytest.mark.parametrize("rescale", [None, False])
def test_dare_linear(rescale: bool | None, whole: dict[str, dict[str, Doubles]], configure: Any) -> None:
    """Each entry is kept with its model's density, rescaled so that the sum of magnitudes stays the same, and summed."""
    models = {"plain": {"weight": 0.5, "density": 0.6}, "other": {"weight": 0.0, "density": 0.3}}
    value = configure("dare_linear", models, parameters={} if rescale is None else {"rescale": rescale})
    found, delta = merge(value, Q0), 0.5 * (whole["plain"][Q0] - whole["base"][Q0])
    kept = found != 0
    assert kept.mean() == pytest.approx(0.6, abs=0.03)
    scale = np.abs(delta).sum() / np.abs(delta[kept]).sum() if rescale is None else 1.0
    np.testing.assert_allclose(found[kept], delta[kept] * scale, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(merge(value, Q0), found)
    assert (merge(value, Q0, seed=1) != found).mean() > 0.3


def test_dare_ties_elects_and_does_not_divide(whole: dict[str, dict[str, Doubles]], configure: Any) -> None:
    """At density 1 nothing is drawn. Only the election remains, whose sum mergekit does not normalize by default."""
    weights = {"plain": 0.5, "other": 0.8}
    value = configure("dare_ties", {name: {"weight": weight} for name, weight in weights.items()})
    assert_near(merge(value, Q0), by_hand(whole, Q0, weights, elect=True), but=0.001)


def test_gradients_and_filters(whole: dict[str, dict[str, Doubles]], configure: Any) -> None:
    """Lists run from the first layer to the last. The first filter that is part of the tensor's name applies."""
    weight = [{"filter": "self_attn", "value": [0.2, 1.0]}, {"filter": "down_proj.weight", "value": 0.7}, {"value": 0.0}]
    value = configure("task_arithmetic", {"plain": {"weight": weight}, "other": {"weight": [0.4, 0.6, 0.5]}})
    for module, weights in ((Q0, (0.2, 0.4)), (Q1, (1.0, 0.5)), (DOWN1, (0.7, 0.5))):
        expected = by_hand(whole, module, dict(zip(("plain", "other"), weights, strict=True)))
        assert_near(merge(value, module), expected)


@pytest.mark.parametrize(("layers", "expected"), [(5, [0.0, 0.3, 0.6, 0.75, 0.9]), (1, [0.9])])
def test_gradients_between_layers(layers: int, expected: list[float], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
    models = [{"model": f"{tmp_path}+{tmp_path}/a", "parameters": {"weight": [0, 0.6, 0.9]}}]
    config = parse_mergekit({"merge_method": "task_arithmetic", "base_model": str(tmp_path), "models": models})
    found = [config.own(config.sources[0], "weight", f"model.layers.{layer}.mlp.up_proj") for layer in range(layers)]
    assert found == pytest.approx(expected)
    assert config.own(config.sources[0], "weight", "lm_head") == 0, "what stands outside of the layers has the first value"


def test_a_filter_that_misses_leaves_it_to_the_parameters_for_all(whole: dict[str, dict[str, Doubles]], configure: Any) -> None:
    value = configure(
        "task_arithmetic", {"plain": {"weight": [{"filter": "mlp", "value": 0.1}]}}, parameters={"weight": [{"value": 0.9}]}
    )
    assert_near(merge(value, Q0), by_hand(whole, Q0, {"plain": 0.9}))
    assert_near(merge(value, DOWN1), by_hand(whole, DOWN1, {"plain": 0.1}))


def test_a_file_becomes_an_adapter(configure: Any, whole: dict[str, dict[str, Doubles]], tiny_base: Path, tmp_path: Path) -> None:
    """Sums are exact; others are the nearest matrices, with the reported error. Settings without effect are noted."""
    weights = {"plain": {"weight": 0.5}, "other": {"weight": 0.8}}
    path, notes = tmp_path / "merge.yaml", list[str]()
    path.write_text(yaml.safe_dump(configure("task_arithmetic", weights, dtype="bfloat16", tokenizer_source="base")))
    report = compose_mergekit(path, tmp_path / "sum", on_note=notes.append)
    assert report.largest_error == 0
    assert len(notes) == 1
    assert "bfloat16" in notes[0]
    model: Any = PeftModel.from_pretrained(load_base(tiny_base), str(tmp_path / "sum"))
    delta = model.get_submodule(f"base_model.model.{Q0}").get_delta_weight("default").double().numpy()
    assert_near(delta, by_hand(whole, Q0, {"plain": 0.5, "other": 0.8}))
    path.write_text(yaml.safe_dump(configure("ties", {name: {**one, "density": 0.5} for name, one in weights.items()})))
    report = compose_mergekit(path, tmp_path / "ties")
    found, dense = Adapter.open(tmp_path / "ties").dense(Q0), merge(yaml.safe_load(path.read_text()), Q0)
    assert 0 < np.linalg.norm(found - dense) / np.linalg.norm(dense) <= report.largest_error * 1.01


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"merge_method": "slerp"}, "slerp.*linear, task_arithmetic, ties, dare_linear, dare_ties"),
    "slices": ({"slices": [], "models": None}, "slices moves layers.*models is missing"),
    "a tokenizer": ({"tokenizer_source": "union"}, "tokenizer_source = 'union'"),
    "an unknown key": ({"epochs": 3}, "epochs"),
    "no base": ({"base_model": None}, "base_model is missing"),
    "another dtype": ({"dtype": "int8"}, "dtype = 'int8'"),
    "another base": ({"models": [{"model": "x+a"}]}, r"x\+a is an adapter of another base than BASE"),
    "a whole model": ({"models": [{"model": "x"}]}, "x is a whole model"),
    "the base alone": ({"models": [{"model": "BASE"}]}, "lists no adapter"),
    "a revision": ({"models": [{"model": "BASE+a@main"}]}, "a local folder"),
    "twice": ({"models": [{"model": "BASE+a"}, {"model": "BASE+a"}]}, "listed twice"),
    "no model": ({"models": [{"parameters": {}}]}, r"models\[1\] has no model"),
    "a parameter of another method": ({"parameters": {"epsilon": 0.1}}, "parameters.epsilon has no effect on ties"),
    "a shared parameter in a model": (
        {"models": [{"model": "BASE+a", "parameters": {"normalize": True}}]},
        r"models\[1\].parameters.normalize has no effect on ties here; it takes weight, density",
    ),
    "a condition that is no list": ({"parameters": {"weight": {"filter": "mlp", "value": 1}}}, "parameters.weight = {'filter'"),
    "words": ({"parameters": {"weight": "heavy"}}, "parameters.weight = 'heavy'"),
    "an empty list": ({"parameters": {"density": []}}, "parameters.density"),
    "a gradient over unknown layers": (
        {"parameters": {"density": [0.1, 0.2]}},
        "number of layers of BASE, which is not a local folder",
    ),
}


@pytest.mark.parametrize(("change", "mention"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_meaning_here_is_refused_by_name(change: dict[str, Any], mention: str) -> None:
    models = [{"model": "BASE+a", "parameters": {"weight": 1}}]
    with pytest.raises(InputError, match=mention):
        parse_mergekit({"merge_method": "ties", "base_model": "BASE", "models": models, **change})


def test_values_that_mergekit_stops_at(configure: Any) -> None:
    with pytest.raises(InputError, match=r"plain has no weight for model.layers.0.self_attn.q_proj"):
        merge(configure("ties", {"plain": {}}), Q0)
    with pytest.raises(InputError, match="density 1e-05 keeps nothing of adapter-plain"):
        merge(configure("ties", {"plain": {"weight": 1, "density": 1e-5}}), Q0)
    with pytest.raises(InputError, match="sum to 0"):
        merge(configure("linear", {"plain": {"weight": 1}, "other": {"weight": -1}}), Q0)
    with pytest.raises(InputError, match=r"weight = inf is not a number"):
        merge(configure("ties", {"plain": {"weight": float("inf")}}), Q0)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    with pytest.raises(InputError, match="does not exist"):
        read_mergekit(path)
    for text, mention in (("a: [", "not readable YAML"), ("- 1\n", "is not a mapping"), ("models: []\n", "merge_method None")):
        path.write_text(text)
        with pytest.raises(InputError, match=mention):
            read_mergekit(path)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "mention"),
    [
        ("a: 2001-99-99", "not readable YAML"),
        ("a: !!timestamp x", "not readable YAML"),
        ("[" * 5000, "not readable YAML"),
        (LAUGHS, "more than 100000 values"),
        ("a: &a [*a]", "more than 100000 values"),
        ("merge_method: linear\nmodels: 1.5", "models is missing"),
        (f"merge_method: linear\nmodels: [{{model: b+a, parameters: {{weight: {'9' * 400}}}}}]", "is not a number"),
        (f"merge_method: ties\nbase_model: {'a' * 5000}\nparameters: {{weight: [0, 1]}}", "cannot be looked up"),
    ],
    ids=["a date", "no time", "deep", "laughs", "in itself", "models as a number", "a large weight", "a long path"],
)
def test_hostile_yaml_is_refused_in_one_line(text: str, mention: str, tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text(text)
    with pytest.raises(InputError, match=mention) as caught:
        read_mergekit(tmp_path / "merge.yaml")
    assert str(caught.value).isprintable()
