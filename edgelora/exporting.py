"""`edgelora export`: from a recipe to a bundle. Opens the adapters, makes the mixes, and hands them to the exporter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.adapters import Adapter, check_same_base
from edgelora.mix import Mix
from edgelora.recipe import Recipe, VariantRecipe, read_recipe
from edgelora_export.architectures import read_decoder
from edgelora_export.base import Base
from edgelora_export.build import build_bundle
from edgelora_export.variants import Variant
from edgelora_runtime.errors import InputError
from edgelora_runtime.manifest import AdapterEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgelora_export.decoder import Decoder
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
    check_shapes(adapters, read_decoder(base.config, recipe.context_length))
    return build_bundle(
        base,
        [_plan_variant(name, variant, adapters) for name, variant in recipe.variants.items()],
        Path(output),
        quantization=recipe.quantization,
        adapters={name: AdapterEntry(adapter.sha256, adapter.rank) for name, adapter in adapters.items()},
        live_adapters=_choose_live(recipe, adapters),
        default_variant=recipe.default,
        context_length=recipe.context_length,
        on_progress=on_progress,
    )


def _plan_variant(name: str, recipe: VariantRecipe, adapters: Mapping[str, Adapter]) -> Variant:
    if recipe.kind == "live":
        return Variant(name, recipe.mix, recipe.method, live=recipe.mix)
    delta = Mix(adapters, recipe.mix, recipe.method, recipe.density) if recipe.mix else None
    return Variant(name, recipe.mix, recipe.method, delta)


def _choose_live(recipe: Recipe, adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The adapters that go along as factors; refuses live variants of those that are no factors, with the reason."""
    if not any(variant.kind == "live" for variant in recipe.variants.values()):
        return {}
    reasons = {name: reason for name, adapter in adapters.items() if (reason := _why_not_live(adapter))}
    for name, variant in recipe.variants.items():
        if variant.kind == "live" and (wrong := [f"{each}: {reasons[each]}" for each in variant.mix if each in reasons]):
            raise InputError(f"variant {name} cannot be live ({'; '.join(wrong)}); use kind = 'merged'")
    return {name: adapter for name, adapter in adapters.items() if name not in reasons}


def _why_not_live(adapter: Adapter) -> str:
    for module in adapter.modules:
        if reason := adapter.in_terms_of_base(module):
            return f"{module} is {reason}, no sum of products"
        if adapter.is_embedding(module) or module == "lm_head":
            return f"{module} is outside of the decoder's layers, which alone have live inputs"
    return ""


def check_shapes(adapters: Mapping[str, Adapter], decoder: Decoder) -> None:
    """Refuses adapters whose matrices do not fit the base's, all of them in one message."""
    fitting = {part.module: (part.out_features, part.in_features) for linear in decoder.linears for part in linear.parts}
    for tensor in (decoder.embedding, decoder.head):
        fitting[tensor.removesuffix(".weight")] = (decoder.vocab_size, decoder.hidden_size)
    wrong = [
        f"{module} is {rows}x{columns} in {name}, {fitting[module][0]}x{fitting[module][1]} in the base"
        for name, adapter in adapters.items()
        for module, (rows, columns, _) in adapter.shapes.items()
        if fitting.get(module, (rows, columns)) != (rows, columns)
    ]
    if wrong:
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise InputError(f"adapters of another base: {shown}")
