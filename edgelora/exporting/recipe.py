"""Reads recipe.toml: the base, the adapters, and the mixes that become variants.

All mistakes are reported in one message.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.adapters.provenance import TRAINED_ON
from edgelora.exporting.recipe_keys import ADAPTER, GATE, QUANTIZATION, ROUTER, TOP, VARIANT
from edgelora.mix.methods import DEFAULT_DENSITY, MIX_METHODS
from edgelora.mix.weights import check_weight
from edgelora_export.base.files import look_up, read_toml
from edgelora_export.bundle.gate import Gate
from edgelora_export.plan.targets import CPU, check_targets
from edgelora_export.plan.variants import MERGE_BASES, Quantization
from edgelora_runtime.bundle.manifest import check_variant_name
from edgelora_runtime.errors import InputError, suggest_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora.exporting.recipe_keys import Key
    from edgelora.mix.weights import Weight

KINDS = ("merged", "live")


@dataclass(frozen=True)
class AdapterRecipe:
    """One adapter of a recipe.

    path: a PEFT or MLX folder, or a GGUF file. trained_on: nf4, int4 or none, the base's form during training, for an adapter
    without edgelora.json.
    """

    path: Path
    trained_on: str | None = None


@dataclass(frozen=True)
class VariantRecipe:
    """One variant of a recipe.

    mix: per adapter a number, or numbers by pattern of module names. {} is the bare base. density, seed: for methods that use
    them. merge_base: None for the recipe's.
    """

    mix: Mapping[str, Weight]
    kind: str = "merged"
    method: str = "linear"
    density: float = DEFAULT_DENSITY
    merge_base: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class RouterRecipe:
    """A router, which picks a variant for each prompt.

    It learns from the prompts that the variants' adapters were trained on.
    variants: the variants to choose from, or None for all that have training data. fallback: the variant for prompts unlike any
    of theirs, or None for the default. threshold: the confidence below which the fallback is used as well. data: by variant,
    files of rows to use instead of its adapters' training data.
    """

    variants: tuple[str, ...] | None = None
    fallback: str | None = None
    threshold: float = 0.0
    data: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A bundle to build.

    base: a local folder, a GGUF file or a hub id. adapters: folder or GGUF file by name. default: the variant that a runtime
    starts with, or None for the first. context_length: positions of the bundle, or None for the model's own, up to a limit.
    calibration: general text or rows to quantize and judge on, in addition to the adapters' training data. gate: what variants
    must keep of their adapters.
    targets: what each variant gets a graph for: cpu, gpu or both. merge_base: the base that merged variants are merged into:
    float, trained (the quantized base of the adapters' training), or auto for the better one. router: None for a bundle without a
    router. end_tokens: texts or ids of the tokens that end an answer, None for those that the base, its tokenizer and its chat
    template name. draft_tables: whether to include draft tables for speculation. They contain fragments of the adapters' training
    data. trained_on: nf4, int4 or none by adapter, for those without edgelora.json: the base's form during training.
    """

    base: str
    adapters: Mapping[str, Path]
    variants: Mapping[str, VariantRecipe]
    quantization: Quantization = field(default_factory=Quantization)
    default: str | None = None
    context_length: int | None = None
    calibration: Path | None = None
    gate: Gate = field(default_factory=Gate)
    targets: tuple[str, ...] = (CPU.name,)
    merge_base: str = "auto"
    router: RouterRecipe | None = None
    draft_tables: bool = False
    trained_on: Mapping[str, str] = field(default_factory=dict)
    end_tokens: tuple[str | int, ...] | None = None


def read_recipe(path: Path | str) -> Recipe:
    """Reads a recipe file.

    Paths in it are relative to its folder. InputError lists every mistake.
    """
    path = Path(path)
    return parse_recipe(read_toml(path, "a recipe says what to export"), path.parent, str(path))


def parse_recipe(value: Mapping[str, Any], folder: Path, label: str = "recipe") -> Recipe:
    """Makes a Recipe from parsed TOML, as read_recipe() does."""
    wrong: list[str] = []

    def take(table: Mapping[str, Any], where: str, keys: Mapping[str, Key]) -> dict[str, Any]:
        """Returns the known keys of a table that have the right type. Notes all others."""
        wrong.extend(
            f"{where}{key} is not a known key; known: {', '.join(keys)}{suggest_name([key], keys)}"
            for key in table
            if key not in keys
        )
        taken = {}
        for key, known in keys.items():
            if key in table:
                if isinstance(table[key], known.types) and (bool in known.types or not isinstance(table[key], bool)):
                    taken[key] = table[key]
                else:
                    wrong.append(f"{where}{key} = {table[key]!r} has the wrong type")
        return taken

    top = take(value, "", TOP)
    if "base" not in top and "base" not in value:
        wrong.append('base is missing; write base = "path or hub id"')
    if not top.get("variants") and "variants" not in value:
        wrong.append("variants is missing; write at least [variants.base] with mix = {}")
    adapters: dict[str, AdapterRecipe] = {}
    for name, location in top.get("adapters", {}).items():
        entry = take(location, f"adapters.{name}.", ADAPTER) if isinstance(location, dict) else {"path": location}
        path, said = entry.get("path"), entry.get("trained_on")
        if not isinstance(path, str):
            wrong.append(f"adapters.{name} = {location!r} is not a path, nor a table with one")
        elif reason := check_variant_name(name):
            wrong.append(f"adapters.{name}: {reason}")
        elif said is not None and said not in TRAINED_ON:
            wrong.append(f"adapters.{name}.trained_on = {said!r}: use one of {', '.join(TRAINED_ON)}")
        else:
            adapters[name] = AdapterRecipe(folder / path, said)
    variants = {}
    for name, table in top.get("variants", {}).items():
        where = f"variants.{name}."
        if reason := check_variant_name(name):
            wrong.append(f"variants.{name}: {reason}")
        if not isinstance(table, dict):
            wrong.append(f"variants.{name} is not a table")
            continue
        taken = take(table, where, VARIANT)
        wrong += _check_variant(taken, where, top.get("adapters", {}))
        variants[name] = taken
    quantization = take(top.get("quantization", {}), "quantization.", QUANTIZATION)
    gate = take(top.get("gate", {}), "gate.", GATE)
    router = take(top.get("router", {}), "router.", ROUTER)
    wrong += _check_router(router, top.get("variants", {}))
    wrong += _check_merge_base(top, "")
    if not all(isinstance(token, str | int) and not isinstance(token, bool) for token in top.get("end_tokens", [])):
        wrong.append(f"end_tokens = {top['end_tokens']!r} is not a list of token texts or ids")
    if "default" in top and top["default"] not in top.get("variants", {}):
        near = suggest_name([top["default"]], top.get("variants", {}))
        wrong.append(f"default = {top['default']!r} is not a variant of the recipe{near}")
    try:
        patterns = quantization.pop("int8", [])
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise InputError(f"int8 = {patterns!r} is not a list of names")
        grid = Quantization(**quantization, int8=tuple(patterns))
    except InputError as error:
        wrong.append(f"quantization: {error}")
    try:
        checked = Gate(**gate)
    except InputError as error:
        wrong.append(str(error))
    targets = top.get("targets", [CPU.name])
    try:
        check_targets(targets)
    except InputError as error:
        wrong.append(str(error))
    if wrong:
        raise InputError(f"{label}: {'; '.join(wrong[:8])}{' …' if len(wrong) > 8 else ''}")
    base = folder / top["base"]
    return Recipe(
        base=str(base) if look_up(base) else top["base"],
        adapters={name: entry.path for name, entry in adapters.items()},
        variants={name: VariantRecipe(**{"mix": {}, **taken}) for name, taken in variants.items()},
        quantization=grid,
        default=top.get("default"),
        context_length=top.get("context_length"),
        calibration=folder / top["calibration"] if "calibration" in top else None,
        gate=checked,
        targets=tuple(targets),
        merge_base=top.get("merge_base", "auto"),
        router=_read_router(router, folder) if "router" in top else None,
        draft_tables=top.get("draft_tables", False),
        trained_on={name: entry.trained_on for name, entry in adapters.items() if entry.trained_on is not None},
        end_tokens=tuple(top["end_tokens"]) if "end_tokens" in top else None,
    )


def _check_variant(table: Mapping[str, Any], where: str, adapters: Mapping[str, Any]) -> list[str]:
    wrong = []
    for name, weight in table.get("mix", {}).items():
        if name not in adapters:
            wrong.append(f"{where}mix names {name}, which is not in [adapters]{suggest_name([name], adapters)}")
        wrong += check_weight(weight, f"{where}mix.{name}")
    if not 0 < table.get("density", 1) <= 1:
        wrong.append(f"{where}density = {table['density']}: use a share, more than 0 and at most 1")
    if not 0 <= table.get("seed", 0) < 1 << 53:
        wrong.append(f"{where}seed = {table['seed']}: use a whole number from 0 to 2^53")
    method = table.get("method", "linear")
    if method in MIX_METHODS:
        idle = [key for key in ("density", "seed") if key in table and key not in MIX_METHODS[method].settings]
        wrong += [f"{where}{key} has no effect on method {method}; leave it out" for key in idle]
    for key, allowed in (("kind", KINDS), ("method", MIX_METHODS)):
        if key in table and table[key] not in allowed:
            wrong.append(f"{where}{key} = {table[key]!r}: use one of {', '.join(allowed)}{suggest_name([table[key]], allowed)}")
    wrong += _check_merge_base(table, where)
    if table.get("merge_base") == "trained" and (table.get("kind") == "live" or not table.get("mix")):
        wrong.append(f"{where}merge_base = 'trained' is for a merged variant with a mix; leave it out here")
    if table.get("kind") == "live" and not table.get("mix"):
        wrong.append(f"{where}kind = 'live' needs a mix; without one use kind = 'merged'")
    by_module = [name for name, weight in table.get("mix", {}).items() if isinstance(weight, dict)]
    if table.get("kind") == "live" and by_module:
        wrong.append(
            f"{where}mix gives {', '.join(by_module)} weights by module, but a live variant has one weight per adapter; "
            "make it one adapter with edgelora compose, or use kind = 'merged'"
        )
    if table.get("kind") == "live" and method != "linear":
        wrong.append(
            f"{where}method = {method!r} is not a plain sum of adapters, as a live variant must be; "
            "make it one adapter with edgelora compose, or use kind = 'merged'"
        )
    return wrong


def _check_merge_base(table: Mapping[str, Any], where: str) -> list[str]:
    if table.get("merge_base", "auto") in MERGE_BASES:
        return []
    return [f"{where}merge_base = {table['merge_base']!r}: use one of {', '.join(MERGE_BASES)}"]


def _check_router(table: Mapping[str, Any], variants: Mapping[str, Any]) -> list[str]:
    wrong = []
    for key in ("variants", "data"):
        wrong += [
            f"router.{key} names {name!r}, which is not a variant{suggest_name([str(name)], variants)}"
            for name in table.get(key, ())
            if name not in [*variants]
        ]
    if table.get("variants") == []:
        wrong.append("router.variants is empty; leave it out to choose from all variants with training data")
    if "fallback" in table and table["fallback"] not in variants:
        near = suggest_name([table["fallback"]], variants)
        wrong.append(f"router.fallback = {table['fallback']!r} is not a variant of the recipe{near}")
    if not 0 <= table.get("threshold", 0) <= 1:
        wrong.append(f"router.threshold = {table['threshold']}: use a probability, from 0 to 1")
    for name, paths in table.get("data", {}).items():
        if not paths or not (
            isinstance(paths, str) or (isinstance(paths, list) and all(isinstance(path, str) for path in paths))
        ):
            wrong.append(f"router.data.{name} = {paths!r} is neither a file nor a list of files")
    return wrong


def _read_router(table: Mapping[str, Any], folder: Path) -> RouterRecipe:
    data = {name: (paths,) if isinstance(paths, str) else tuple(paths) for name, paths in table.get("data", {}).items()}
    return RouterRecipe(
        variants=tuple(table["variants"]) if "variants" in table else None,
        fallback=table.get("fallback"),
        threshold=float(table.get("threshold", 0.0)),
        data={name: tuple(folder / path for path in paths) for name, paths in data.items()},
    )
