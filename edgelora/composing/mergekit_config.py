"""Reads a mergekit configuration that merges LoRA adapters of one base.

Everything else is refused, with the reason. The schema and its rules are those of mergekit's config.py and plan.py at
https://github.com/arcee-ai/mergekit/tree/a6e402884ba9bc30da7f23e8304a35f19485de95/mergekit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from edgelora_export.base.files import look_up, read_json, read_parsed
from edgelora_runtime.bundle.manifest import FLOAT32_MAX
from edgelora_runtime.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Number: TypeAlias = "float | tuple[float, ...]"
"""A number, or a gradient: values interpolated from the first layer to the last."""

MERGEKIT_METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
_SPARSE = ("ties", "dare_linear", "dare_ties")
_GLOBAL = {
    "linear": ("normalize",),
    "task_arithmetic": ("normalize", "lambda", "int8_mask"),
    **dict.fromkeys(_SPARSE, ("normalize", "lambda", "int8_mask", "rescale")),
}
_TENSOR = {"linear": ("weight",), "task_arithmetic": ("weight",), **dict.fromkeys(_SPARSE, ("weight", "density"))}
_DTYPES = ("float32", "float16", "bfloat16")
_MOST_VALUES = 100_000
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Setting:
    """A mergekit parameter.

    The first case whose filter is in the tensor's name applies. The filter None is in all.
    """

    cases: tuple[tuple[str | None, Number], ...]

    def value(self, tensor: str, depth: float) -> float | None:
        """Returns the value for a tensor, named with ".weight".

        depth: 0 in the first layer or outside the layers, 1 in the last.
        """
        for part, number in self.cases:
            if part is None or part in tensor:
                return _interpolate(number, depth)
        return None

    @property
    def is_graded(self) -> bool:
        return any(isinstance(number, tuple) and len(number) > 1 for _, number in self.cases)


Settings: TypeAlias = "Mapping[str, Setting]"


@dataclass(frozen=True)
class MergeSource:
    """One entry of the list of models.

    adapter: None for the bare base. settings: the entry's own parameters.
    """

    adapter: Path | None
    settings: Settings


@dataclass(frozen=True)
class MergekitConfig:
    """A merge.

    settings: parameters for all models. layers: the base's number of layers, or None if no gradient needs it. notes: messages for
    the user.
    """

    method: str
    base: str
    sources: tuple[MergeSource, ...]
    settings: Settings = field(default_factory=dict)
    layers: int | None = None
    notes: tuple[str, ...] = ()

    def shared(self, name: str, module: str, default: float) -> float:
        """A parameter that all models share, for one module."""
        found = self.settings[name].value(*self._place(module)) if name in self.settings else None
        return default if found is None else found

    def own(self, source: MergeSource, name: str, module: str) -> float | None:
        """Returns a model's own parameter for one module, or else the shared one."""
        for settings in (source.settings, self.settings):
            if name in settings and (found := settings[name].value(*self._place(module))) is not None:
                return found
        return None

    def _place(self, module: str) -> tuple[str, float]:
        """The name of a module's tensor, and its depth from 0 to 1."""
        layer = _LAYER.search(module)
        depth = 0.0
        if layer and self.layers:
            depth = int(layer[1]) / (self.layers - 1) if self.layers > 1 else 1.0
        return f"{module}.weight", depth


def read_mergekit(path: Path | str) -> MergekitConfig:
    """Reads a mergekit YAML file.

    Folders in it are relative to the working directory, as in mergekit.
    Raises InputError, which lists every key or value that does not apply to adapters of one base, with the reason, and
    MissingExtraError without pyyaml.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("pyyaml", "export") from error

    def parse(text: str) -> Any:
        try:
            return yaml.safe_load(text)
        except Exception as error:  # for dates and numbers that are none, errors of any kind
            raise ValueError(error) from error

    value = read_parsed(Path(path), parse, "YAML", "it says what to merge")
    _refuse_large(value, path)
    if not isinstance(value, dict):
        raise InputError(f"mergekit file {path} is not a mapping; it needs merge_method and models")
    return parse_mergekit(value, str(path))


def _refuse_large(value: Any, path: Path | str) -> None:
    """Refuses what anchors make much larger than its text, or endless."""
    waiting, count = [value], 0
    while waiting:
        item = waiting.pop()
        count += 1
        if count > _MOST_VALUES:
            raise InputError(f"mergekit file {path} has more than {_MOST_VALUES} values; write it without anchors")
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple | set):
            waiting += item


def parse_mergekit(value: Mapping[str, Any], label: str = "mergekit file") -> MergekitConfig:
    """Makes a MergekitConfig from parsed YAML, as read_mergekit() does."""
    wrong: list[str] = []
    method = value.get("merge_method")
    if method not in MERGEKIT_METHODS:
        raise InputError(f"{label}: merge_method {method!r} is not supported; use one of {', '.join(MERGEKIT_METHODS)}")
    notes = _check_top(value, wrong)
    settings = _read_settings(value.get("parameters"), (*_GLOBAL[method], *_TENSOR[method]), method, "parameters", wrong)
    base, sources = _read_models(value, method, wrong)
    layers = None
    if any(setting.is_graded for owner in (settings, *(source.settings for source in sources)) for setting in owner.values()):
        layers = _count_layers(base, wrong)
    if wrong:
        raise InputError(f"{label}: {'; '.join(wrong[:8])}{' …' if len(wrong) > 8 else ''}")
    return MergekitConfig(method, base, tuple(sources), settings, layers, tuple(notes))


def _read_models(value: Mapping[str, Any], method: str, wrong: list[str]) -> tuple[str, list[MergeSource]]:
    """Reads the base that all models share, and the models.

    Appends mistakes to `wrong`.
    """
    entries = []
    models = value.get("models")
    for place, model in enumerate(models if isinstance(models, list) else (), 1):
        where = f"models[{place}]"
        if not isinstance(model, dict) or not isinstance(model.get("model"), str):
            wrong.append(f"{where} has no model: write base+adapter, two paths joined by a plus sign")
            continue
        wrong += [f"{where}.{key} is not known" for key in model if key not in ("model", "parameters")]
        settings = _read_settings(model.get("parameters"), _TENSOR[method], method, f"{where}.parameters", wrong)
        entries.append((model["model"], settings))
    references = [reference for reference, _ in entries]
    base = value.get("base_model")
    if base is None and method != "linear":
        wrong.append(f"base_model is missing; {method} needs it to compute differences")
    elif base is not None and not isinstance(base, str):
        wrong.append(f"base_model = {base!r} is not the name of a model")
    shared = str(base or next((reference.partition("+")[0] for reference in references if "+" in reference), ""))
    sources = []
    for reference, settings in entries:
        owner, plus, adapter = reference.partition("+")
        if references.count(reference) > 1:
            wrong.append(f"{reference} is listed twice, and mergekit would use only one")
        if "+" in adapter or "@" in adapter:
            wrong.append(f"{reference} is not of the form base+adapter, with a local folder as the adapter")
        if owner != shared:
            kind = f"is an adapter of another base than {shared}" if plus else "is a whole model, not an adapter"
            wrong.append(f"{reference} {kind}; only adapters of one base can be mixed, in the form base+adapter")
        sources.append(MergeSource(Path(adapter) if plus else None, settings))
    if not any(source.adapter for source in sources):
        wrong.append("models lists no adapter, in the form base+adapter")
    if method == "linear" and base is not None and base not in references:
        sources.append(MergeSource(None, {}))  # mergekit adds the base with the shared weight
    return shared, sources


def _check_top(value: Mapping[str, Any], wrong: list[str]) -> list[str]:
    """Returns notes on keys without effect.

    Appends to `wrong` the keys that an adapter cannot represent.
    """
    notes = []
    reasons = {
        "slices": "moves layers, which an adapter cannot",
        "modules": "merges parts of multi-module models",
        "tokenizer": "builds a tokenizer, but adapters share their base's",
        "chat_template": "belongs to a whole model",
    }
    for key, content in value.items():
        if content is None or key in ("merge_method", "base_model", "models", "parameters"):
            continue
        if key in ("dtype", "out_dtype"):
            if content not in _DTYPES:
                wrong.append(f"{key} = {content!r}: mergekit has {', '.join(_DTYPES)}")
            elif content != "float32":
                notes.append(f"{key} = {content}: ignored; the merge is computed and written in float32")
        elif key == "tokenizer_source":
            if content not in ("base", value.get("base_model")):
                wrong.append(f"tokenizer_source = {content!r}: adapters share their base's tokenizer; use base or leave it out")
        elif key in reasons:
            wrong.append(f"{key} {reasons[key]}; leave it out")
        else:
            wrong.append(f"{key} is not a known mergekit key")
    if not isinstance(value.get("models"), list) or not value["models"]:
        wrong.append("models is missing; write a list of - model: base+adapter")
    return notes


def _read_settings(value: Any, known: Sequence[str], method: str, where: str, wrong: list[str]) -> dict[str, Setting]:
    """The parameters of a table. Appends mistakes to `wrong`."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        wrong.append(f"{where} is not a mapping")
        return {}
    settings = {}
    for name, content in value.items():
        if name not in known:
            wrong.append(f"{where}.{name} has no effect on {method} here; it takes {', '.join(known)}")
        elif (setting := _read_setting(content)) is None:
            wrong.append(f"{where}.{name} = {content!r} is not a number, a list of numbers, or a list of filter and value")
        else:
            settings[name] = setting
    return settings


def _read_setting(value: Any) -> Setting | None:
    number = _read_number(value)
    if number is not None:
        return Setting(((None, number),))
    if not isinstance(value, list) or not value:
        return None
    cases = []
    for case in value:
        if not isinstance(case, dict) or not {"value"} <= case.keys() <= {"value", "filter"}:
            return None
        part, number = case.get("filter"), _read_number(case["value"])
        if number is None or not isinstance(part, str | None):
            return None
        cases.append((None if part == "*" else part, number))
    return Setting(tuple(cases))


def _read_number(value: Any) -> Number | None:
    """A number or a gradient. Booleans count as 0 and 1, as in mergekit."""
    if _is_finite(value):
        return float(value)
    if isinstance(value, list) and value and all(map(_is_finite, value)):
        return tuple(map(float, value))
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= FLOAT32_MAX


def _interpolate(number: Number, depth: float) -> float:
    if isinstance(number, float):
        return number
    place = depth * (len(number) - 1)
    low = int(place)
    high = min(low + 1, len(number) - 1)
    return (1 - (place - low)) * number[low] + (place - low) * number[high]


def _count_layers(base: str, wrong: list[str]) -> int | None:
    if not look_up(Path(base, "config.json")):
        wrong.append(f"a list of values needs the number of layers of {base}, which is not a local folder")
        return None
    layers = read_json(Path(base, "config.json"), "a base needs it").get("num_hidden_layers")
    if not isinstance(layers, int):
        wrong.append(f"a list of values needs the number of layers of {base}, whose config.json has no num_hidden_layers")
        return None
    return layers
