"""The space that a search walks: which points it begins with, and which ones Optuna proposes after them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.methods import DEFAULT_DENSITY
from edgelora_runtime.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgelora.search.config import SearchConfig

    Parameters = Mapping[str, float | str]

WITHOUT_DENSITY = {"linear"}
_WEIGHT = "weight "  # begins the name of an adapter's parameter


@dataclass(frozen=True)
class Point:
    """A mix to try: a method, its density (None where it has no use for one), and weights by adapter."""

    method: str
    density: float | None
    weights: Mapping[str, float]


def read_point(parameters: Parameters) -> Point:
    """The mix that parameters stand for; weights and density to three decimals, as they go into a recipe."""
    method, scale = str(parameters["method"]), float(parameters.get("scale", 1.0))
    weights = {
        name.removeprefix(_WEIGHT): round(scale * float(value), 3)
        for name, value in parameters.items()
        if name.startswith(_WEIGHT)
    }
    return Point(method, None if method in WITHOUT_DENSITY else round(float(parameters["density"]), 3), weights)


def list_references(config: SearchConfig) -> list[Parameters]:
    """The base, and each adapter alone: what every mix is measured against, within the ranges or not."""
    alone = [{name: float(name == one) for name in config.adapters} for one in config.adapters]
    return [_parameters(config, config.methods[0], weights) for weights in (dict.fromkeys(config.adapters, 0.0), *alone)]


def list_beginnings(config: SearchConfig) -> list[Parameters]:
    """The references, then equal weights by each method: a sum and a mean by the first, a sum by the others.

    Where the range of weights has neither, its middle takes their place.
    """
    low, high = config.weights
    values = [value for value in (1.0, 1 / len(config.adapters)) if low <= value <= high] or [(low + high) / 2]
    equal = [_parameters(config, config.methods[0], dict.fromkeys(config.adapters, value)) for value in values]
    others = [_parameters(config, method, dict.fromkeys(config.adapters, values[0])) for method in config.methods[1:]]
    return [*list_references(config), *equal, *others]


def is_within(config: SearchConfig, parameters: Parameters) -> bool:
    """Whether a point's weights lie within their range, as a reference's need not."""
    low, high = config.weights
    return all(low <= float(value) <= high for name, value in parameters.items() if name.startswith(_WEIGHT))


def propose(config: SearchConfig, tried: Sequence[tuple[Parameters, float]], count: int) -> list[Parameters]:
    """The next points after those that were tried, which come with their values, higher ones better.

    Decided by these and the seed alone, so that a search that was killed goes on as if it had not been.
    """
    import optuna

    space = _distributions(config)
    seed = int(np.random.SeedSequence([config.seed, len(tried)]).generate_state(1)[0])
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study and trial
    try:
        study = optuna.create_study(direction="maximize", sampler=_make_sampler(choose_sampler(config), seed))
        for parameters, value in tried:
            if is_within(config, parameters):
                study.add_trial(optuna.trial.create_trial(params=dict(parameters), distributions=space, value=value))
        return [dict(study.ask(space).params) for _ in range(count)]
    finally:
        optuna.logging.set_verbosity(verbosity)


def choose_sampler(config: SearchConfig) -> str:
    """The sampler by name: what "auto" stands for depends on whether scipy is there, which Optuna's gp needs."""
    if config.sampler == "gp" and find_spec("scipy") is None:
        raise MissingExtraError("scipy", "search")
    return config.sampler if config.sampler != "auto" else "tpe" if find_spec("scipy") is None else "gp"


def _make_sampler(name: str, seed: int) -> Any:
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import GPSampler, TPESampler

    if name == "tpe":
        return TPESampler(seed=seed, multivariate=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return GPSampler(seed=seed, deterministic_objective=True)


def _parameters(config: SearchConfig, method: str, weights: Mapping[str, float]) -> Parameters:
    """A point at the default density and at scale 1, or the nearest to them that the ranges have."""
    parameters: dict[str, float | str] = {"method": method}
    space = _distributions(config)
    for name, value in (("density", DEFAULT_DENSITY), ("scale", 1.0)):
        if name in space:
            parameters[name] = min(max(value, space[name].low), space[name].high)
    return {**parameters, **{f"{_WEIGHT}{name}": value for name, value in weights.items()}}


def _distributions(config: SearchConfig) -> dict[str, Any]:
    """Optuna's distribution of each parameter. Density is drawn for every method, so that they share one space."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    found: dict[str, Any] = {"method": CategoricalDistribution(config.methods)}
    if not set(config.methods) <= WITHOUT_DENSITY:
        found["density"] = FloatDistribution(*config.density)
    if config.scale is not None:
        found["scale"] = FloatDistribution(*config.scale)
    return {**found, **{f"{_WEIGHT}{name}": FloatDistribution(*config.weights) for name in config.adapters}}
