"""Plans a bundle from a recipe.

It opens base and adapters, makes the mixes, and describes each variant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgelora.adapters.checks import check_same_base, check_shapes, list_no_factors
from edgelora.adapters.folder import open_adapters
from edgelora.exporting.calibration_sets import CalibrationSets
from edgelora.exporting.draft_tables import make_draft_tables
from edgelora.exporting.kept_codes import explain_not_kept, find_kept, same_grid
from edgelora.exporting.trained_base import find_quantization, read_trained_base
from edgelora.mix.mix import Mix
from edgelora.mix.weights import EVERYWHERE
from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.base.texts import TextsOfFolder
from edgelora_export.bundle.plan import BundlePlan
from edgelora_export.bundle.texts import BundleTexts, read_bundle_texts
from edgelora_export.plan.adapted_decoder import explain_not_live
from edgelora_export.plan.variants import Variant
from edgelora_runtime._version import __version__
from edgelora_runtime.bundle.manifest import AdapterEntry
from edgelora_runtime.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgelora.adapters.folder import Adapter
    from edgelora.exporting.recipe import Recipe, VariantRecipe
    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.calibration import Calibration
    from edgelora_export.plan.variants import Delta, PackedRouter


@dataclass(frozen=True)
class Sources:
    """A recipe with its base and its adapters opened."""

    recipe: Recipe
    base: Base
    adapters: Mapping[str, Adapter]

    @property
    def entries(self) -> dict[str, AdapterEntry]:
        """The manifest's entries for the adapters."""
        return {name: AdapterEntry(adapter.sha256, adapter.rank) for name, adapter in self.adapters.items()}


def open_sources(recipe: Recipe, *, on_note: Callable[[str], None] = lambda note: None) -> Sources:
    """Opens the base and the adapters of a recipe.

    Ensures: the adapters were trained on this base, as far as edgelora.json says. on_note: gets what adapters name and lack.
    Raises InputError for a base or an adapter that cannot be used.
    """
    base = Base.find(recipe.base)
    adapters = open_adapters(recipe.adapters, base=base.config, trained_on=recipe.trained_on, on_note=on_note)
    check_same_base(adapters, base.sha256)
    return Sources(recipe, base, adapters)


def plan_bundle(
    sources: Sources, router: PackedRouter | None = None, *, on_note: Callable[[str], None] = lambda note: None
) -> BundlePlan:
    """The plan of a recipe's bundle, for a base with a native graph.

    Ensures: every adapter fits the base, and every variant has its mix, calibration set and merge base.
    As soon as one variant is live, all adapters that can be live go along as factors, for mixes at request time.
    Raises InputError for what cannot be built, and for a gate that is to fail without samples to measure on.
    """
    recipe, base, adapters = sources.recipe, sources.base, sources.adapters
    decoder = read_decoder(base.config, recipe.context_length)
    check_shapes(adapters, decoder)
    texts = read_texts(sources, decoder.vocab_size)
    own_text = recipe.quantization.calibrated
    sets = CalibrationSets(texts, decoder, adapters, general=recipe.calibration, own_text=own_text)
    blind = [name for name, variant in recipe.variants.items() if variant.mix and not sets.of(variant.mix).held_out]
    if blind and recipe.gate.policy == "fail":
        raise InputError(
            f"--gate fail: there is nothing to judge {', '.join(blind)} on, as the adapters' training data are not where "
            "edgelora.json says; give --calibration FILE.jsonl"
        )
    if blind and recipe.quantization.bits != 32:
        how = "quantized on general text alone" if own_text else "rounded to nearest"
        on_note(
            f"{', '.join(blind)}: the adapters' training data are not to be found, so weights are {how} and nothing is "
            "measured; give --calibration FILE.jsonl"
        )
    variants, base_calibration = _plan_variants(sources, sets, decoder, on_note), sets.of_all()
    return BundlePlan(
        base,
        decoder,
        variants,
        quantization=recipe.quantization,
        adapters=sources.entries,
        live_adapters=_choose_live(recipe, adapters, decoder),
        base_calibration=base_calibration,
        gate=None if recipe.gate.policy == "off" else recipe.gate,
        default=recipe.default,
        targets=recipe.targets,
        router=router,
        draft_tables=make_draft_tables(adapters, texts) if recipe.draft_tables else {},
        texts=texts,
        resume_key=_hash_plan(sources, [base_calibration, *(variant.calibration for variant in variants)]),
    )


def read_texts(sources: Sources, vocab_size: int) -> BundleTexts:
    """Reads the tokenizer, chat templates and end tokens of a recipe's base, and those beside its adapters' weights.

    Ensures: each variant has one of each. Raises InputError for variants of adapters that bring different ones.
    """
    beside = {name: TextsOfFolder(adapter.folder) for name, adapter in sources.adapters.items() if adapter.folder.is_dir()}
    sizes = {name: adapter.vocab_size for name, adapter in sources.adapters.items() if adapter.vocab_size is not None}
    ends = sources.recipe.end_tokens
    texts = read_bundle_texts(sources.base, vocab_size, beside, vocab_sizes=sizes, end_tokens=ends)
    for variant in sources.recipe.variants.values():
        texts.find(variant.mix)
    return texts


def plan_mix(name: str, variant: VariantRecipe, adapters: Mapping[str, Adapter]) -> Variant:
    """Makes a recipe's variant as the exporter and the manifest describe it.

    Calibration and merge base are not known yet.
    """
    mix = Mix(adapters, variant.mix, variant.method, variant.density, variant.seed) if variant.mix else None
    by_module = {adapter: weight for adapter, weight in variant.mix.items() if isinstance(weight, Mapping)}
    weights = {a: weight.get(EVERYWHERE, 0.0) if isinstance(weight, Mapping) else weight for a, weight in variant.mix.items()}
    options = mix.options() if mix else {}
    seed = options.get("seed")
    return Variant(
        name,
        weights,
        variant.method,
        delta=mix,
        live=weights if variant.kind == "live" else None,
        weights=by_module,
        density=options.get("density"),
        seed=None if seed is None else int(seed),
    )


def _plan_variants(
    sources: Sources, sets: CalibrationSets, decoder: Decoder, on_note: Callable[[str], None]
) -> tuple[Variant, ...]:
    """Makes the recipe's variants.

    Each has its calibration set, and the base that its adapters were trained on.
    """
    recipe = sources.recipe
    planned, unknown = [], []
    for name, variant in recipe.variants.items():
        plan = plan_mix(name, variant, sources.adapters)
        mix = plan.delta
        kept = find_kept(mix, decoder) if isinstance(mix, Mix) and plan.live is None else None
        if kept is not None and "trained" in (variant.merge_base or recipe.merge_base):
            raise InputError(
                f"variant {name}: merge_base = 'trained', but its adapter was trained on merged weights of the float base; "
                "leave merge_base out"
            )
        if kept is not None and (planned_as := _keep_codes(recipe, plan, kept, sets, on_note)) is not None:
            planned.append(planned_as)
            continue
        merge_base = (variant.merge_base or recipe.merge_base) if mix and plan.live is None else "float"
        quantization = find_quantization(mix) if isinstance(mix, Mix) else None
        trained = None
        if isinstance(mix, Mix) and quantization:
            try:
                trained = read_trained_base(mix, quantization, decoder)
            except MissingExtraError:
                if merge_base == "trained":
                    raise
                unknown.append(name)
        elif merge_base == "trained":
            raise InputError(
                f"variant {name}: merge_base = 'trained', and edgelora.json names no one 4-bit base that all of its adapters "
                "were trained on; use 'float'"
            )
        planned.append(replace(plan, calibration=sets.of(variant.mix), trained=trained, merge_base=merge_base))
    if unknown:
        on_note(
            f"{', '.join(unknown)}: without bitsandbytes (pip install 'edgelora[train]') the NF4 base that the adapters were "
            "trained on cannot be made, and the float base takes its place"
        )
    return tuple(planned)


def _keep_codes(
    recipe: Recipe, plan: Variant, kept: Delta, sets: CalibrationSets, on_note: Callable[[str], None]
) -> Variant | None:
    """Plans a variant that keeps the codes of merge-aware training. Returns None if the bundle's grid is another."""
    if recipe.quantization.bits == 32:
        return None
    if difference := explain_not_kept(recipe.quantization):
        on_note(f"{plan.name}: {difference}; leave that out for the codes of training")
    if not same_grid(recipe.quantization):
        return None
    return replace(plan, calibration=sets.of(plan.mix), kept=kept)


def _choose_live(recipe: Recipe, adapters: Mapping[str, Adapter], decoder: Decoder) -> dict[str, Adapter]:
    """Finds the adapters that can be applied as factors.

    Raises InputError, with the reason, for a live variant of one that cannot.
    """
    reasons = {name: reason for name, adapter in adapters.items() if (reason := _why_not_live(adapter, decoder))}
    for name, variant in recipe.variants.items():
        if variant.kind == "live" and (wrong := [f"{each}: {reasons[each]}" for each in variant.mix if each in reasons]):
            raise InputError(f"variant {name} cannot be live ({'; '.join(wrong)}); use kind = 'merged'")
        if variant.kind == "live" and (
            by_module := [each for each, weight in variant.mix.items() if isinstance(weight, Mapping)]
        ):
            raise InputError(
                f"variant {name} cannot be live ({', '.join(by_module)} weighs by module); make it one adapter with edgelora "
                "compose, or use kind = 'merged'"
            )
    return {name: adapter for name, adapter in adapters.items() if name not in reasons}


def _why_not_live(adapter: Adapter, decoder: Decoder) -> str:
    if obstacle := explain_not_live(decoder, adapter):
        return obstacle
    if reasons := list_no_factors(adapter, embeddings=True):
        return f"{reasons[0]}, no sum of products"
    return ""


def _hash_plan(sources: Sources, calibrations: Sequence[Calibration]) -> str:
    """Hashes everything that decides the weights of a bundle.

    That is the code, the base, the adapters, the mixes, and what GPTQ sees.
    """
    recipe = sources.recipe
    held = {
        name: (adapter.trained_on, adapter.provenance is not None and adapter.provenance.merge_aware)
        for name, adapter in sources.adapters.items()
    }
    mixes = (recipe.merge_base, dict(recipe.variants), sources.entries, held)
    parts = (__version__, sources.base.sha256, recipe.quantization, mixes, calibrations)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
