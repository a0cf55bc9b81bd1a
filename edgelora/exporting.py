"""`edgelora export`: from a recipe to a bundle. Opens the adapters, makes the mixes, and hands them to the exporter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.adapters import Adapter, check_same_base
from edgelora.mix import Mix
from edgelora.recipe import Recipe, VariantRecipe, read_recipe
from edgelora_export.architectures import native_types, read_decoder
from edgelora_export.base import Base
from edgelora_export.build import build_bundle
from edgelora_export.optimum_front import trace_decoder
from edgelora_export.traced_bundle import TracedMatrices, build_traced_bundle, check_traceable
from edgelora_export.variants import Variant
from edgelora_runtime.errors import InputError
from edgelora_runtime.manifest import AdapterEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgelora_runtime.manifest import Manifest


def export(
    recipe: Recipe | Path | str,
    output: Path | str,
    *,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Manifest:
    """Builds the bundle of a recipe, given as a file or as a Recipe; returns its manifest.

    As soon as one variant is live, all adapters of the recipe go along as factors, for mixes at request time.
    Raises InputError for a recipe, base or adapter that cannot be used, ResourceError for a full disk; the output folder
    is then as it was.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    base = Base.find(recipe.base)
    adapters = {name: Adapter.open(folder, name) for name, folder in recipe.adapters.items()}
    check_same_base(adapters, base.sha256)
    variants = [_plan_variant(name, variant, adapters) for name, variant in recipe.variants.items()]
    if base.config.get("model_type") not in native_types():
        return _export_traced(recipe, base, variants, adapters, Path(output), on_progress)
    decoder = read_decoder(base.config, recipe.context_length)
    parts = [part for linear in decoder.linears for part in linear.parts]
    _check_shapes(adapters, {part.module: (part.out_features, part.in_features) for part in parts})
    return build_bundle(
        base,
        variants,
        Path(output),
        quantization=recipe.quantization,
        adapters={name: AdapterEntry(adapter.sha256, adapter.rank) for name, adapter in adapters.items()},
        live_adapters=adapters if any(variant.kind == "live" for variant in recipe.variants.values()) else {},
        default_variant=recipe.default,
        context_length=recipe.context_length,
        on_progress=on_progress,
    )


def _export_traced(
    recipe: Recipe,
    base: Base,
    variants: Sequence[Variant],
    adapters: Mapping[str, Adapter],
    output: Path,
    on_progress: Callable[[int, int, str], None],
) -> Manifest:
    """A base without a native graph, through Optimum."""
    check_traceable(variants, recipe.quantization)
    on_progress(0, 1, "tracing")
    with trace_decoder(base, recipe.context_length) as traced:
        matrices = TracedMatrices(traced)
        _check_shapes(adapters, matrices.shapes)
        return build_traced_bundle(
            base,
            traced,
            matrices,
            variants,
            output,
            quantization=recipe.quantization,
            adapters={name: AdapterEntry(adapter.sha256, adapter.rank) for name, adapter in adapters.items()},
            default_variant=recipe.default,
            on_progress=on_progress,
        )


def _plan_variant(name: str, recipe: VariantRecipe, adapters: Mapping[str, Adapter]) -> Variant:
    if recipe.kind == "live":
        return Variant(name, recipe.mix, recipe.method, live=recipe.mix)
    delta = Mix(adapters, recipe.mix, recipe.method, recipe.density) if recipe.mix else None
    return Variant(name, recipe.mix, recipe.method, delta)


def _check_shapes(adapters: Mapping[str, Adapter], fitting: Mapping[str, tuple[int, int]]) -> None:
    """Refuses adapters whose matrices do not fit the base's, (N, K) by module, all of them in one message."""
    wrong = [
        f"{module} is {rows}x{columns} in {name}, {fitting[module][0]}x{fitting[module][1]} in the base"
        for name, adapter in adapters.items()
        for module, (rows, columns, _) in adapter.shapes.items()
        if fitting.get(module, (rows, columns)) != (rows, columns)
    ]
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise InputError(f"adapters of another base: {shown}")
