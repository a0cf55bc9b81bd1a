"""`edgelora export`: from a recipe to a bundle. Opens the adapters, makes the mixes, and hands them to the exporter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.adapters.checks import check_same_base, check_shapes, compare_shapes
from edgelora.adapters.folder import Adapter
from edgelora.data.calibration import GENERAL_SHARE, find_training_data, gather_calibration
from edgelora.exporting.draft_tables import make_draft_tables
from edgelora.exporting.recipe import Recipe, read_recipe
from edgelora.exporting.train_router import make_router
from edgelora.exporting.trained_base import find_quantization, read_trained_base
from edgelora.mix.mix import Mix
from edgelora.mix.weights import EVERYWHERE
from edgelora_export.architectures import native_types, read_decoder
from edgelora_export.bundle.builder import build_bundle
from edgelora_export.bundle.draft import end_tokens
from edgelora_export.plan.targets import CPU
from edgelora_export.plan.variants import Variant
from edgelora_export.stream.auto_round import require_auto_round
from edgelora_export.traced.bundle import TracedMatrices, build_traced_bundle, check_traceable
from edgelora_export.traced.optimum import trace_decoder
from edgelora_export.weights.base import Base
from edgelora_runtime._version import __version__
from edgelora_runtime.bundle.manifest import AdapterEntry
from edgelora_runtime.bundle.tokenizer import TOKENIZER, load_tokenizer
from edgelora_runtime.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tokenizers import Tokenizer as RustTokenizer

    from edgelora.exporting.recipe import VariantRecipe
    from edgelora_export.bundle.gate import Gate
    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.calibration import Calibration
    from edgelora_export.plan.variants import PackedRouter
    from edgelora_runtime.bundle.manifest import Manifest


def export(
    recipe: Recipe | Path | str,
    output: Path | str,
    *,
    calibration: Path | str | None = None,
    gate: str | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Manifest:
    """Builds the bundle of a recipe, given as a file or as a Recipe; returns its manifest.

    calibration: general text or rows, and gate: the policy; each in place of the recipe's.
    As soon as one variant is live, all adapters of the recipe go along as factors, for mixes at request time.
    Raises InputError for a recipe, base or adapter that cannot be used, MissingExtraError for method auto-round without its
    package, ResourceError for a full disk; the output folder is then as it was.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    if recipe.quantization.method == "auto-round":
        require_auto_round()
    base = Base.find(recipe.base)
    adapters = {name: Adapter.open(folder, name) for name, folder in recipe.adapters.items()}
    check_same_base(adapters, base.sha256)
    judged = recipe.gate if gate is None else replace(recipe.gate, policy=gate)
    if recipe.router is not None:
        on_progress(0, 1, "learning the router")
    router = make_router(recipe, adapters)
    if base.config.get("model_type") not in native_types():
        return _export_traced(recipe, base, adapters, Path(output), judged, router, on_progress, on_note)
    decoder = read_decoder(base.config, recipe.context_length)
    check_shapes(adapters, decoder)
    quantization = recipe.quantization
    general = Path(calibration) if calibration else recipe.calibration
    sets = _Calibrations(base, adapters, general, decoder, own_text=quantization.calibrated)
    blind = [name for name, variant in recipe.variants.items() if variant.mix and not sets.of(variant.mix).held_out]
    if blind and judged.policy == "fail":
        raise InputError(
            f"--gate fail: there is nothing to judge {', '.join(blind)} on, as the adapters' training data are not where "
            "edgelora.json says; give --calibration FILE.jsonl"
        )
    variants = _plan_variants(recipe, adapters, sets, decoder, on_note)
    entries = {name: AdapterEntry(adapter.sha256, adapter.rank) for name, adapter in adapters.items()}
    tables: dict[str, bytes] = {}
    if recipe.drafts:
        on_progress(0, 1, "counting how completions go on")
        tables = make_draft_tables(adapters, sets.encode, next(iter(end_tokens(base)), None))
    try:
        manifest = build_bundle(
            base,
            variants,
            Path(output),
            quantization=quantization,
            adapters=entries,
            live_adapters=_choose_live(recipe, adapters),
            base_calibration=sets.of(adapters),
            gate=None if judged.policy == "off" else judged,
            default_variant=recipe.default,
            context_length=recipe.context_length,
            targets=recipe.targets,
            router=router,
            draft_tables=tables,
            plan=_hash_plan(base, recipe, entries, [sets.of(adapters), *(variant.calibration for variant in variants)]),
            on_progress=on_progress,
        )
    except KeyboardInterrupt:
        on_note(f"interrupted: what is finished lies beside {output}, and the same export goes on from there")
        raise
    if blind and quantization.bits != 32:
        how = "quantized on general text alone" if quantization.calibrated else "rounded to nearest"
        on_note(
            f"{', '.join(blind)}: the adapters' training data are not to be found, so weights are {how} and nothing is "
            "measured; give --calibration FILE.jsonl"
        )
    return manifest


def _hash_plan(base: Base, recipe: Recipe, adapters: Mapping[str, AdapterEntry], calibrations: Sequence[Calibration]) -> str:
    """One hash of all that decides the weights of a bundle: the code, the base, the adapters, the mixes, what GPTQ sees."""
    mixes = (recipe.merge_base, dict(recipe.variants), dict(adapters))
    parts = (__version__, base.sha256, recipe.quantization, mixes, calibrations)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _export_traced(
    recipe: Recipe,
    base: Base,
    adapters: Mapping[str, Adapter],
    output: Path,
    gate: Gate,
    router: PackedRouter | None,
    on_progress: Callable[[int, int, str], None],
    on_note: Callable[[str], None],
) -> Manifest:
    """A base without a native graph, through Optimum: rounded to nearest, not judged."""
    if gate.policy == "fail":
        raise InputError(
            f"--gate fail: a {base.config.get('model_type')} is exported through Optimum, whose variants are not judged"
        )
    if recipe.targets != (CPU.name,):
        raise InputError(
            f"targets = {list(recipe.targets)}: a {base.config.get('model_type')} is exported through Optimum, for cpu alone"
        )
    if "trained" in {recipe.merge_base, *(variant.merge_base for variant in recipe.variants.values())}:
        raise InputError("merge_base = 'trained': what is exported through Optimum is merged into the float base; use 'float'")
    quantization = replace(recipe.quantization, method="rtn") if recipe.quantization.bits != 32 else recipe.quantization
    variants = [_plan_mix(name, variant, _make_mix(variant, adapters)) for name, variant in recipe.variants.items()]
    check_traceable(variants, quantization)
    on_progress(0, 1, "tracing")
    with trace_decoder(base, recipe.context_length) as traced:
        matrices = TracedMatrices(traced)
        compare_shapes(adapters, matrices.shapes)
        manifest = build_traced_bundle(
            base,
            traced,
            matrices,
            variants,
            output,
            quantization=quantization,
            adapters={name: AdapterEntry(adapter.sha256, adapter.rank) for name, adapter in adapters.items()},
            default_variant=recipe.default,
            router=router,
            on_progress=on_progress,
        )
    if quantization.bits != 32:
        on_note("exported through Optimum: weights are rounded to nearest and nothing is measured")
    return manifest


class _Calibrations:
    """Calibration sets by the adapters that they are for; each is gathered once.

    general: the user's file. own_text: whether to add the general text that comes with edgelora.
    """

    def __init__(
        self, base: Base, adapters: Mapping[str, Adapter], general: Path | None, decoder: Decoder, *, own_text: bool
    ) -> None:
        self._base, self._adapters, self._general, self._own_text = base, adapters, general, own_text
        self._widest = max(linear.columns for linear in decoder.linears)
        self._sets: dict[frozenset[str], Calibration] = {}

    def of(self, names: Iterable[str]) -> Calibration:
        """The set for a mix of these adapters."""
        key = frozenset(names)
        if key not in self._sets:
            found = [find_training_data(adapter) for name, adapter in self._adapters.items() if name in key]
            trained_on = [path for path in found if path is not None]
            files = [*trained_on, *([self._general] if self._general else [])]
            share = 0.0 if not self._own_text else GENERAL_SHARE if trained_on else 1.0
            self._sets[key] = gather_calibration(files, self.encode, widest=self._widest, general_share=share)
        return self._sets[key]

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    @cached_property
    def _tokenizer(self) -> RustTokenizer:
        path = self._base.folder / TOKENIZER
        if not path.is_file():
            raise InputError(f"base {self._base.folder} has no {TOKENIZER}; save its fast tokenizer there (save_pretrained does)")
        return load_tokenizer(path.read_bytes())


def _plan_variants(
    recipe: Recipe,
    adapters: Mapping[str, Adapter],
    sets: _Calibrations,
    decoder: Decoder,
    on_note: Callable[[str], None],
) -> list[Variant]:
    """The recipe's variants as the exporter takes them."""
    planned, unknown = [], []
    for name, variant in recipe.variants.items():
        mix = _make_mix(variant, adapters)
        plan = _plan_mix(name, variant, mix)
        merge_base = (variant.merge_base or recipe.merge_base) if mix and plan.live is None else "float"
        quantization = find_quantization(mix) if mix else None
        trained = None
        if mix and quantization:
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
    return planned


def _make_mix(variant: VariantRecipe, adapters: Mapping[str, Adapter]) -> Mix | None:
    return Mix(adapters, variant.mix, variant.method, variant.density, variant.seed) if variant.mix else None


def _plan_mix(name: str, variant: VariantRecipe, mix: Mix | None) -> Variant:
    """What the exporter and the manifest have to know of a mix."""
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


def _choose_live(recipe: Recipe, adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The adapters that can be applied as factors; refuses live variants of the others, with the reason."""
    reasons = {name: reason for name, adapter in adapters.items() if (reason := _why_not_live(adapter))}
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


def _why_not_live(adapter: Adapter) -> str:
    for module in adapter.modules:
        if reason := adapter.why_not_low_rank(module):
            return f"{module} is {reason}, no sum of products"
        if adapter.is_embedding(module) or module == "lm_head":
            return f"{module} is outside of the decoder's layers, which alone have live inputs"
    return ""
