"""The search space: initial points, and the points that Optuna proposes next."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.mix.methods import DEFAULT_DENSITY, DENSITY, MIX_METHODS
from edgelora_runtime.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgelora.search.config import SearchConfig

    Parameters = Mapping[str, float | str]

_WEIGHT = "weight "  # prefix of an adapter's parameter name


@dataclass(frozen=True)
class Point:
    """A mix to try: weights by adapter, a method, and the method's settings (density, seed)."""

    weights: Mapping[str, float]
    method: str = "linear"
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_point(config: SearchConfig, parameters: Parameters) -> Point:
    """Reads the mix that parameters encode.

    Weights and density are rounded to three decimals, as in the recipe.
    """
    method, scale = str(parameters["method"]), float(parameters.get("scale", 1.0))
    settings = {DENSITY: round(float(parameters.get(DENSITY, DEFAULT_DENSITY)), 3), "seed": config.seed}
    weights = {
        name.removeprefix(_WEIGHT): round(scale * float(value), 3)
        for name, value in parameters.items()
        if name.startswith(_WEIGHT)
    }
    return Point(weights, method, {name: settings[name] for name in MIX_METHODS[method].settings})


def list_initial_points(config: SearchConfig) -> list[Parameters]:
    """Lists the points that every search tries first, whatever the ranges are.

    They are the base, each single adapter at weight 1, and equal weights: the sum and the mean by the first method, and the sum
    by every other method. If the range of weights has neither, its end farther from 0 replaces them.
    """
    alone = [{name: float(name == one) for name in config.adapters} for one in (None, *config.adapters)]
    low, high = config.weights
    values = [value for value in (1.0, 1 / len(config.adapters)) if low <= value <= high] or [max(config.weights, key=abs)]
    equal = [(config.methods[0], value) for value in values] + [(method, values[0]) for method in config.methods[1:]]
    scale = 1.0 if config.scale is None else min(max(1.0, config.scale[0]), config.scale[1])
    return [
        *(_make_parameters(config, "linear", weights, 1.0) for weights in alone),
        *(_make_parameters(config, method, dict.fromkeys(config.adapters, value), scale) for method, value in equal),
    ]


def is_within(config: SearchConfig, parameters: Parameters) -> bool:
    """True if a point lies in the search space. Initial points may not."""
    return all(
        parameters[name] in distribution.choices
        if name == "method"
        else distribution.low <= float(parameters[name]) <= distribution.high
        for name, distribution in _distributions(config).items()
    )


def propose(config: SearchConfig, tried: Sequence[tuple[Parameters, float]], count: int) -> list[Parameters]:
    """Proposes the next points, given the tried points and their values.

    Higher values are better. The proposals depend only on these and the seed, so an interrupted search continues as if it had not
    been interrupted.
    """
    import optuna

    space = _distributions(config)
    seed = int(np.random.SeedSequence([config.seed, len(tried)]).generate_state(1)[0])
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # Optuna logs every study and trial
    try:
        study = optuna.create_study(direction="maximize", sampler=_make_sampler(choose_sampler(config), seed))
        for parameters, value in tried:
            if is_within(config, parameters):
                study.add_trial(optuna.trial.create_trial(params=dict(parameters), distributions=space, value=value))
        return [dict(study.ask(space).params) for _ in range(count)]
    finally:
        optuna.logging.set_verbosity(verbosity)


def choose_sampler(config: SearchConfig) -> str:
    """Names the sampler to use.

    "auto" is gp if scipy is installed, which Optuna's gp needs, else tpe.
    """
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


def _make_parameters(config: SearchConfig, method: str, weights: Mapping[str, float], scale: float) -> Parameters:
    """Makes a point at the default density, or at the nearest one in the range."""
    parameters: dict[str, float | str] = {"method": method}
    space = _distributions(config)
    if DENSITY in space:
        parameters[DENSITY] = min(max(DEFAULT_DENSITY, space[DENSITY].low), space[DENSITY].high)
    if "scale" in space:
        parameters["scale"] = scale
    return {**parameters, **{f"{_WEIGHT}{name}": value for name, value in weights.items()}}


def _distributions(config: SearchConfig) -> dict[str, Any]:
    """Makes Optuna's distribution of each parameter.

    All methods share one space, so density is drawn even for methods without it.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    found: dict[str, Any] = {"method": CategoricalDistribution(config.methods)}
    if any(DENSITY in MIX_METHODS[method].settings for method in config.methods):
        found[DENSITY] = FloatDistribution(*config.density)
    if config.scale is not None:
        found["scale"] = FloatDistribution(*config.scale)
    return {**found, **{f"{_WEIGHT}{name}": FloatDistribution(*config.weights) for name in config.adapters}}
