"""`edgelora export`: from a recipe to a bundle.

docs/how/walk.md tells it function by function.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.adapters.checks import compare_shapes
from edgelora.exporting.plan import Sources, open_sources, plan_bundle, plan_mix, read_texts
from edgelora.exporting.recipe import Recipe, read_recipe
from edgelora.exporting.train_router import make_router
from edgelora_export.architectures import native_types
from edgelora_export.bundle.builder import build_bundle
from edgelora_export.plan.targets import CPU
from edgelora_export.stream.auto_round import require_auto_round
from edgelora_export.traced.bundle import TracedMatrices, TracedPlan, build_traced_bundle, find_vocab_size
from edgelora_export.traced.optimum import trace_decoder
from edgelora_export.weights.publish import check_target
from edgelora_runtime.bundle.manifest import MANIFEST
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgelora_export.plan.variants import PackedRouter
    from edgelora_runtime.bundle.manifest import Manifest

    OnProgress = Callable[[int, int, str], None]


def export(
    recipe: Recipe | Path | str,
    output: Path | str,
    *,
    calibration: Path | str | None = None,
    gate: str | None = None,
    on_progress: OnProgress = lambda done, total, what: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Manifest:
    """Builds the bundle of a recipe and returns its manifest.

    recipe: a file or a Recipe. calibration: general text or rows, and gate: the policy. Each replaces the recipe's own.
    Raises InputError for a recipe, base or adapter that cannot be used, IntegrityError for a variant that does not pass the gate,
    MissingExtraError for method auto-round without its package, ResourceError for a full disk. The output folder is then
    as it was. Weights that were finished are kept beside it for the next run, and on_note says where.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    if calibration is not None:
        recipe = replace(recipe, calibration=Path(calibration))
    if gate is not None:
        recipe = replace(recipe, gate=replace(recipe.gate, policy=gate))
    if recipe.quantization.method == "auto-round":
        require_auto_round()
    check_target(Path(output), marker=MANIFEST)
    sources = open_sources(recipe, on_note=on_note)
    if recipe.router is not None:
        on_progress(0, 1, "learning the router")
    router = make_router(recipe, sources.adapters)
    if sources.base.config.get("model_type") not in native_types():
        manifest = _export_traced(sources, router, Path(output), on_progress)
        if recipe.quantization.bits != 32:
            on_note("exported through Optimum: weights are rounded to nearest and nothing is measured")
        return manifest
    on_progress(0, 1, "planning")
    plan = plan_bundle(sources, router, on_note=on_note)
    try:
        return build_bundle(plan, Path(output), on_progress=on_progress)
    except BaseException as error:
        for note in getattr(error, "__notes__", ()):
            on_note(note)
        raise


def _export_traced(sources: Sources, router: PackedRouter | None, output: Path, on_progress: OnProgress) -> Manifest:
    """Exports a base without a native graph through Optimum.

    Weights are rounded to nearest, and not measured.
    """
    recipe, model_type = sources.recipe, sources.base.config.get("model_type")
    if recipe.gate.policy == "fail":
        raise InputError(f"--gate fail: a {model_type} is exported through Optimum, whose variants are not judged")
    if recipe.targets != (CPU.name,):
        raise InputError(f"targets = {list(recipe.targets)}: a {model_type} is exported through Optimum, for cpu alone")
    if "trained" in {recipe.merge_base, *(variant.merge_base for variant in recipe.variants.values())}:
        raise InputError("merge_base = 'trained': what is exported through Optimum is merged into the float base; use 'float'")
    quantization = replace(recipe.quantization, method="rtn") if recipe.quantization.bits != 32 else recipe.quantization
    plan = TracedPlan(
        sources.base,
        tuple(plan_mix(name, variant, sources.adapters) for name, variant in recipe.variants.items()),
        quantization=quantization,
        adapters=sources.entries,
        default=recipe.default,
        router=router,
        texts=read_texts(sources, find_vocab_size(sources.base)),
    )
    on_progress(0, 1, "tracing")
    with trace_decoder(sources.base, recipe.context_length) as traced:
        matrices = TracedMatrices(traced)
        compare_shapes(sources.adapters, matrices.shapes)
        return build_traced_bundle(plan, traced, matrices, output, on_progress=on_progress)
