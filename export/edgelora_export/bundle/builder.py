"""Builds a bundle from its plan, stage by stage, in a folder that gets the bundle's name once it is complete."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from edgelora_export.bundle.entries import (
    describe_base,
    describe_files,
    describe_model,
    describe_quantization,
    describe_variant,
)
from edgelora_export.bundle.fidelity import Comparison, Subject, Teacher, compare, run_teacher
from edgelora_export.bundle.gate import MakeLive, MergeIntoFloat, RaiseToInt8, find_live_obstacle, name_worst, propose_repairs
from edgelora_export.bundle.genai_config import GENAI_CONFIG, pack_genai_config
from edgelora_export.bundle.graphs import find_live_products, write_graphs, write_live_adapters
from edgelora_export.bundle.merge_base import choose_merge_base
from edgelora_export.bundle.progress import Progress
from edgelora_export.bundle.texts import read_generation_settings
from edgelora_export.bundle.weights import BundleWeights
from edgelora_export.graph.live_slots import name_live_slots
from edgelora_export.plan.adapted_decoder import explain_not_live
from edgelora_export.plan.targets import CPU
from edgelora_export.weights.publish import BLOB, staged_folder, write_file, write_hashed
from edgelora_runtime import Runtime
from edgelora_runtime._version import __version__
from edgelora_runtime.bundle.draft_table import DRAFT_TABLE
from edgelora_runtime.bundle.folder import Bundle
from edgelora_runtime.bundle.manifest import MANIFEST, FidelityEntry, Manifest, ProductFidelity
from edgelora_runtime.errors import IntegrityError
from edgelora_runtime.residency.memory import return_freed_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from edgelora_export.bundle.gate import Gate, Repair
    from edgelora_export.bundle.plan import BundlePlan
    from edgelora_export.bundle.progress import OnProgress
    from edgelora_export.plan.variants import Variant

    Outcome = Literal["measured", "passed", "repaired", "live"]


def build_bundle(plan: BundlePlan, output: Path, *, on_progress: OnProgress = lambda done, total, what: None) -> Manifest:
    """Builds the bundle of a plan and publishes it in one step: a reader sees the old folder or the new one, never a mixture.

    on_progress(done, total, what) is called per layer. Raises InputError for a base or an output folder that cannot be used,
    IntegrityError if a variant does not pass the gate, ResourceError for a full disk. Finished weights are then kept: see
    staged_folder.
    """
    with staged_folder(output, marker=MANIFEST, plan=plan.resume_key) as folder:
        builder = BundleBuilder(plan, folder, on_progress)
        builder.write_texts()
        builder.write_factors()
        builder.choose_merge_bases()
        builder.store_weights()
        builder.pass_gate()
        return builder.write_bundle()


class Measurement(NamedTuple):
    """A variant's figures, and the kernels that ran it."""

    comparison: Comparison
    kernels: str


class BundleBuilder:
    """A bundle in the making. The methods without a name argument are its stages, and `folder` holds what they have written.

    variants: by name, in the bundle's order. A stage replaces a variant when its merge base is chosen or its kind changes.
    """

    def __init__(self, plan: BundlePlan, folder: Path, on_progress: OnProgress = lambda done, total, what: None) -> None:
        self._plan, self._folder = plan, folder
        self._progress = Progress(on_progress, len(plan.decoder.layers))
        self._weights = BundleWeights(plan, folder, self._progress)
        self._draft_tables: dict[str, str] = {}  # file by adapter
        self._fidelity: dict[str, FidelityEntry] = {}
        self.variants: dict[str, Variant] = {variant.name: variant for variant in plan.variants}
        self._weights.expect_progress(self.variants)
        self._progress.expect(len(self._find_measured()))

    def write_texts(self) -> None:
        """Writes tokenizers, chat templates, configs, router and draft tables.

        Requires: an empty folder, or the blobs of an interrupted run.
        Ensures: these files are in the folder.
        """
        self._plan.texts.write(self._folder)
        if self._plan.router is not None:
            write_file(self._folder / self._plan.router.entry.file, [self._plan.router.content])
        for name, table in self._plan.draft_tables.items():
            self._draft_tables[name] = write_hashed(self._folder, table, DRAFT_TABLE)

    def write_factors(self) -> None:
        """Writes the factors of live adapters, if a variant is live.

        Requires: an empty folder, or the blobs of an interrupted run.
        Ensures: these files are in the folder. Factors that fp16 cannot hold end the export before any weight is quantized.
        """
        write_live_adapters(self._plan, self._folder, self._plan.variants)

    def choose_merge_bases(self) -> None:
        """Chooses the merge base of each variant.

        Requires: no weights are stored.
        Ensures: every merge base is float or trained. Held-out loss decides where it was auto.
        """
        for name, variant in self.variants.items():
            self._progress.show(f"choosing the base of {name}")
            self.variants[name] = choose_merge_base(self._plan.base, self._plan.decoder_of(variant), variant)

    def store_weights(self) -> None:
        """Stores the weights of every variant.

        Requires: merge bases are chosen.
        Ensures: all weights are in blobs, and each product is in the journal.
        """
        return_freed_memory()  # of planning, before the embedding is quantized
        self._weights.store(self.variants)
        return_freed_memory()

    def pass_gate(self) -> None:
        """Measures each variant that has held-out samples, and repairs those that the gate rejects.

        Requires: weights are stored.
        Ensures: each of them is measured, and each one that is still merged passes the plan's gate.

        A variant that falls short is repaired or made live, according to the gate's policy. Raises IntegrityError with the names
        of variants and products if the policy is to fail, or if no repair is possible. Does nothing if the plan has no gate.
        """
        gate = self._plan.gate
        if gate is None:
            return
        refused = [refusal for name in self._find_measured() if (refusal := self._check_variant(name, gate))]
        if refused:
            raise IntegrityError(f"{'; '.join(refused)}; use --gate repair, more bits, or kind = 'live'")

    def write_bundle(self) -> Manifest:
        """Writes graphs, live adapters, genai_config.json and the manifest. Returns the manifest.

        Requires: weights are stored.
        Ensures: the folder is a complete bundle. Blobs and graphs that a repair replaced are removed.
        """
        variants = list(self.variants.values())
        default = self.variants[self._plan.default_variant]
        manifest = self._describe(variants, self._plan.targets)
        used = {file for each in manifest.variants.values() for graph in each.graphs.values() for file in graph.files}
        for path in self._folder.iterdir():
            if path.suffix in (BLOB, ".onnx") and path.name not in used:
                path.unlink()
        # onnxruntime-genai binds no factors and would run a live variant as the bare base, and it knows one tokenizer.
        if default.live is None and manifest.variants[default.name].texts is None:
            graph = manifest.variants[default.name].graphs[CPU.name].file
            write_file(self._folder / GENAI_CONFIG, [self._pack_genai_config(default, graph)])
        manifest = replace(manifest, files=describe_files(self._folder))
        write_file(self._folder / MANIFEST, [manifest.dump()])
        self._progress.finish("written")
        return manifest

    def subject(self, name: str) -> Subject:
        """Returns what the gate measures of a variant. Requires: its weights are stored."""
        variant, plan = self.variants[name], self._plan
        samples = plan.find_calibration(variant).held_out
        weights = self._weights.get(variant)
        return Subject(plan.base, plan.decoder_of(variant), variant, samples, self._folder, weights, self._weights.bare)

    @contextmanager
    def run_variant(self, name: str) -> Iterator[Runtime]:
        """Opens a runtime over a variant's current weights.

        Requires: its weights are stored.
        Ensures: its cpu graph is written.
        """
        manifest = self._describe([self.variants[name]], (CPU.name,))
        manifest = replace(manifest, files=describe_files(self._folder))
        return_freed_memory()  # of quantization, the teacher and an earlier session. The new session may pack the whole model
        with Runtime(Bundle(self._folder, manifest), provider="cpu") as runtime:
            yield runtime

    def repair(self, name: str, repair: Repair) -> None:
        """Repairs a merged variant.

        Requires: its weights are stored.
        Ensures: the weights of the repaired variant are stored.
        """
        variant = self.variants[name]
        if isinstance(repair, RaiseToInt8):
            self._progress.show(f"repairing {name}, {len(repair.products)} products to 8 bits")
            self._weights.raise_to_int8(variant, repair.products)
            return
        if isinstance(repair, MergeIntoFloat):
            self.variants[name] = replace(variant, merge_base="float")
        else:
            self.variants[name] = replace(variant, live=variant.mix, merge_base="float", merge_losses={})
        self._weights.drop(name)
        self._weights.store(self.variants)

    def _find_measured(self) -> list[str]:
        """Lists the variants that the gate measures: those with held-out samples."""
        if self._plan.gate is None:
            return []
        return [name for name, variant in self.variants.items() if self._plan.find_calibration(variant).held_out]

    def _check_variant(self, name: str, gate: Gate) -> str | None:
        """Measures a variant and repairs it until it passes. Returns its shortfalls if the policy is to fail."""
        variant = self.variants[name]
        teacher = run_teacher(self.subject(name), self._progress.start_pass(f"checking {name}"))
        measurement = self._measure(name, teacher)
        outcome: Outcome = "measured" if variant.live is None else "live"
        refusal, products = None, teacher.products
        if variant.delta is not None and variant.live is None:
            outcome = "passed"
            lacking = gate.find_shortfalls(measurement.comparison)
            if lacking and gate.policy == "fail":
                refusal = f"{name} {' and '.join(lacking)}; most is lost in {name_worst(products)}"
            elif lacking:
                outcome, measurement, products = self._try_repairs(name, gate, teacher, measurement.comparison)
        self._fidelity[name] = _describe_fidelity(measurement, outcome, products)
        return refusal

    def _try_repairs(
        self, name: str, gate: Gate, teacher: Teacher, found: Comparison
    ) -> tuple[Outcome, Measurement, dict[str, ProductFidelity]]:
        """Tries one repair after the other. Returns the outcome, and the figures of the variant and of its products."""
        repairs = self._propose_repairs(name, gate, teacher)
        while True:
            repair = next(repairs)
            if isinstance(repair, MakeLive) and (reason := self._find_live_obstacle(self.variants[name])):
                raise IntegrityError(f"{name} {' and '.join(gate.find_shortfalls(found))}, and cannot be made live: {reason}")
            self.repair(name, repair)
            measurement = self._measure(name, teacher)
            if isinstance(repair, MakeLive):
                return "live", measurement, {}
            found = measurement.comparison
            passes = not gate.find_shortfalls(found)
            if passes or isinstance(repair, MergeIntoFloat):
                teacher = run_teacher(self.subject(name))  # measures the repaired products
            if passes:
                return "repaired", measurement, teacher.products
            if isinstance(repair, MergeIntoFloat):
                repairs = self._propose_repairs(name, gate, teacher)

    def _find_live_obstacle(self, variant: Variant) -> str | None:
        plan = self._plan
        return explain_not_live(plan.decoder, variant.delta) or find_live_obstacle(variant, plan.live_adapters)

    def _propose_repairs(self, name: str, gate: Gate, teacher: Teacher) -> Iterator[Repair]:
        variant = self.variants[name]
        return propose_repairs(gate, variant, self._weights.get(variant).grids, teacher.products)

    def _measure(self, name: str, teacher: Teacher) -> Measurement:
        with self.run_variant(name) as runtime:
            found = compare(self.subject(name), teacher, lambda tokens, count: runtime.iterate_logits(tokens, positions=count))
            return Measurement(found, runtime.kernels)

    def _describe(self, variants: Sequence[Variant], targets: Sequence[str]) -> Manifest:
        """Writes graphs and live adapters of some variants. Returns a manifest with only these variants, and no files yet."""
        plan = self._plan
        graphs = write_graphs(plan, self._folder, variants, self._weights, targets)
        files = write_live_adapters(plan, self._folder, variants)
        live = find_live_products(plan, variants)
        return Manifest(
            created_by=f"edgelora {__version__}",
            default_variant=plan.default_variant if plan.default_variant in graphs else variants[0].name,
            base=describe_base(plan.base),
            model=describe_model(plan.decoder, plan.texts.base.end_tokens),
            quantization=describe_quantization(plan.quantization),
            adapters={
                name: replace(
                    entry,
                    file=files.get(name),
                    draft_table=self._draft_tables.get(name),
                    texts=plan.texts.describe([name]) if name in files else None,
                )
                for name, entry in plan.adapters.items()
            },
            live_slots=tuple(name_live_slots(linear) for linear in plan.decoder.linears if linear.name in live),
            variants={
                variant.name: describe_variant(
                    plan, variant, self._weights.get(variant), graphs[variant.name], self._fidelity.get(variant.name)
                )
                for variant in variants
            },
            files={},
            router=None if plan.router is None else plan.router.entry,
        )

    def _pack_genai_config(self, default: Variant, graph: str) -> bytes:
        base = self._plan.base
        settings = {**base.config, **read_generation_settings(base)}
        ends = self._plan.texts.base.end_tokens
        return pack_genai_config(self._plan.decoder_of(default), graph, settings=settings, end_tokens=ends)


def _describe_fidelity(measurement: Measurement, outcome: Outcome, products: dict[str, ProductFidelity]) -> FidelityEntry:
    found = measurement.comparison
    return FidelityEntry(
        outcome=outcome,
        kernels=measurement.kernels,
        tokens=found.tokens,
        kl_mean=found.kl_mean,
        kl_p99=found.kl_p99,
        adapter_kl=found.adapter_kl,
        retention=found.retention,
        top1=found.top1,
        answers=found.answers,
        answers_kept=found.answers_kept,
        perplexity=found.perplexity,
        teacher_perplexity=found.teacher_perplexity,
        products=products,
        trained_kl=found.trained_kl,
    )
