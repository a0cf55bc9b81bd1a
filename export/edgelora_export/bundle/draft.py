"""A bundle in the making: its variants' weights, and the writing of graphs and manifest, as often as something changes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgelora_export.bundle.genai_config import GENAI_CONFIG, pack_genai_config
from edgelora_export.bundle.progress import COMPENSATED
from edgelora_export.graph.decoder_graph import build_graph
from edgelora_export.graph.live_slots import live_slots, pack_live_adapter
from edgelora_export.graph.nodes import mapped_blobs, pack_graph
from edgelora_export.graph.stages import split_graphs
from edgelora_export.plan.targets import CPU, TARGETS
from edgelora_export.stream.embeddings import store_embeddings
from edgelora_export.stream.products import compensates, store_products
from edgelora_export.weights.fp16_copies import HalfStore
from edgelora_export.weights.publish import BLOB, write_file, write_hashed
from edgelora_export.weights.store import (
    Weights,
    read_linear,
    store_end,
    store_ends,
    store_norms,
    store_rounded,
    touches,
    touches_ends,
)
from edgelora_runtime._version import __version__
from edgelora_runtime.bundle.folder import hash_file
from edgelora_runtime.bundle.manifest import (
    MANIFEST,
    BaseEntry,
    CalibrationEntry,
    FidelityEntry,
    FileEntry,
    GraphEntry,
    Manifest,
    ModelEntry,
    QuantizationEntry,
    StageEntry,
    VariantEntry,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir

    from edgelora_export.bundle.progress import Progress
    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.calibration import Calibration
    from edgelora_export.plan.variants import LowRank, Quantization, Variant
    from edgelora_export.weights.base import Base
    from edgelora_export.weights.journal import Journal
    from edgelora_runtime.bundle.manifest import AdapterEntry, RouterEntry

_LIVE = "live"  # stem of the one graph that serves all live variants; no variant may be called so


@dataclass
class Draft:
    """What `folder` holds so far.

    variants, in the bundle's order, may change: a merged one becomes live, products get more bits. adapters: what the
    manifest says of each. factors: the adapters that a live variant may use. base_calibration: what
    the bare base is quantized on. journal: what is finished of the products of variants as they were planned. targets: names
    of what each variant gets a graph for, cpu among them. router: what the manifest says of the one that lies in folder.
    """

    base: Base
    decoder: Decoder
    folder: Path
    default_variant: str
    quantization: Quantization
    variants: dict[str, Variant]
    adapters: Mapping[str, AdapterEntry]
    factors: Mapping[str, LowRank]
    base_calibration: Calibration
    progress: Progress
    journal: Journal
    targets: Sequence[str] = (CPU.name,)
    router: RouterEntry | None = None
    shared: Weights | None = None
    bare: Weights | None = None
    weights: dict[str, Weights] = field(default_factory=dict)
    fidelity: dict[str, FidelityEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._halves = HalfStore(self.folder, self.decoder.wide_norms)

    @property
    def needs_bare(self) -> bool:
        """Whether some variant runs products of the bare base: all but merged ones that change every product do."""
        merged = [variant for variant in self.variants.values() if variant.live is None]
        return len(merged) < len(self.variants) or not all(
            touches(variant.delta, linear) for variant in merged for linear in self.decoder.linears
        )

    def calibration_of(self, name: str) -> Calibration:
        """What a variant is judged on: its own samples, or the base's where it has no delta."""
        variant = self.variants[name]
        return self.base_calibration if variant.delta is None else variant.calibration

    def store_weights(self) -> None:
        """Stores what no variant has stored yet; to be called again after a variant changed."""
        if self.shared is None:
            self.shared = store_norms(self.base, self.decoder, self.folder) | store_embeddings(
                self.base,
                self.decoder,
                self.folder,
                self.quantization,
                [
                    (None, self.base_calibration),
                    *((item.change, item.calibration) for item in self.variants.values() if item.change),
                ],
                self.journal.lane(""),
                on_layer=self.progress.through("embedding"),
            )
        if self.bare is None and self.needs_bare:
            self.bare = store_products(
                self.base,
                self.decoder,
                None,
                self.shared,
                self.folder,
                self.quantization,
                self.journal.lane(""),
                calibration=self.base_calibration,
                on_layer=self.progress.through("base", self._cost(self.base_calibration)),
            )
        for name, variant in self.variants.items():
            if name not in self.weights and variant.live is None and variant.delta is not None:
                shared = self.shared
                if touches_ends(variant.change, self.decoder):
                    shared |= store_ends(self.base, self.decoder, variant.change, self.folder, self.quantization)
                self.weights[name] = store_products(
                    self.base,
                    self.decoder,
                    variant.change,
                    shared,
                    self.folder,
                    self.quantization,
                    self.journal.lane(f"{name}, {variant.merge_base} base"),  # the gate may have changed the base
                    bare=self.bare,
                    calibration=variant.calibration,
                    on_layer=self.progress.through(name, self._cost(variant.calibration)),
                )

    def expect_progress(self) -> None:
        """Tells the progress what store_weights has before it."""
        seen = [self.base_calibration, *(variant.calibration for variant in self.variants.values() if variant.delta is not None)]
        if self.shared is None:
            self.progress.expect(sum(compensates(self.quantization, calibration) for calibration in seen))
        if self.bare is None and self.needs_bare:
            self.progress.expect(1, self._cost(self.base_calibration))
        for name, variant in self.variants.items():
            if name not in self.weights and variant.live is None and variant.delta is not None:
                self.progress.expect(1, self._cost(variant.calibration))

    def _cost(self, calibration: Calibration) -> int:
        return COMPENSATED if compensates(self.quantization, calibration) else 1

    def raise_to_int8(self, name: str, products: Collection[str]) -> None:
        """Stores some of a merged variant's products anew, in 8 bits. Other variants keep theirs."""
        quantization = self.quantization.raise_to_int8(products)
        linears = {linear.name: linear for linear in self.decoder.linears}
        for product in products:
            delta, grid = self.variants[name].change, quantization.grid(product)
            if product in linears:
                stored = store_rounded(self.folder, product, read_linear(self.base, linears[product], delta), grid)
            else:
                stored = store_end(self.base, self.decoder, product, delta, self.folder, grid)
            self.weights[name].take(stored)

    def merge_into_float(self, name: str) -> None:
        """Merges a variant anew, into the float base."""
        self._replace(replace(self.variants[name], merge_base="float"))

    def make_live(self, name: str) -> None:
        """Gives up a merged variant's weights, and runs its mix beside the bare base's."""
        variant = self.variants[name]
        self._replace(replace(variant, live=variant.mix, merge_base="float", merge_losses={}))

    def _replace(self, variant: Variant) -> None:
        self.variants[variant.name] = variant
        del self.weights[variant.name]
        self.store_weights()

    def weights_of(self, name: str) -> Weights:
        """A variant's own weights; the bare base's for a live one and for one without a delta."""
        weights = self.weights.get(name, self.bare)
        assert weights is not None
        return weights

    def write(self, *, final: bool) -> Manifest:
        """Writes graphs and manifest of what is stored, and removes the files that nothing uses any more.

        Unless it is final, the base's own stay: a variant that is made live may need them again.
        """
        graphs = self._write_graphs()
        files = self._write_adapters()
        self._write_genai_config(graphs[self.default_variant][CPU.name].file)
        used = {file for entries in graphs.values() for entry in entries.values() for file in entry.files}
        if not final:
            for weights in (self.shared, self.bare):
                used |= weights.blobs if weights is not None else set()
        for path in self.folder.iterdir():
            if path.suffix in (BLOB, ".onnx") and path.name not in used:
                path.unlink()
        live = self._live_products()
        manifest = Manifest(
            created_by=f"edgelora {__version__}",
            default_variant=self.default_variant,
            base=describe_base(self.base),
            model=_describe_model(self.base, self.decoder),
            quantization=QuantizationEntry(
                self.quantization.bits, self.quantization.block_size, self.quantization.symmetric, self.quantization.method
            ),
            adapters={name: replace(entry, file=files.get(name)) for name, entry in self.adapters.items()},
            live_slots=tuple(live_slots(linear) for linear in self.decoder.linears if linear.name in live),
            variants={name: self._describe_variant(variant, graphs[name]) for name, variant in self.variants.items()},
            files={path.name: describe_file(path) for path in sorted(self.folder.iterdir()) if path.name != MANIFEST},
            router=self.router,
        )
        write_file(self.folder / MANIFEST, [manifest.dump()])
        return manifest

    def _describe_variant(self, variant: Variant, graphs: dict[str, GraphEntry]) -> VariantEntry:
        calibration = self.base_calibration if variant.delta is None or variant.live is not None else variant.calibration
        grids = self.weights_of(variant.name).grids
        return VariantEntry(
            kind="merged" if variant.live is None else "live",
            mix=dict(variant.mix),
            method=variant.method,
            weights={name: dict(by_pattern) for name, by_pattern in variant.weights.items()},
            density=variant.density,
            seed=variant.seed,
            graphs=graphs,
            live=dict(variant.live or {}),
            calibration=CalibrationEntry(dict(calibration.sources), calibration.fit_tokens) if calibration.fit else None,
            int8=tuple(name for name, grid in grids.items() if grid.bits == 8 and self.quantization.bits == 4),
            merge_base=variant.trained.quantization if variant.trained and variant.merge_base == "trained" else "float",
            merge_losses=dict(variant.merge_losses),
            fidelity=self.fidelity.get(variant.name),
        )

    def _live_products(self) -> frozenset[str]:
        """Products that take LoRA inputs: those that some adapter changes, once a variant is live."""
        if all(variant.live is None for variant in self.variants.values()):
            return frozenset()
        modules = frozenset[str]().union(*(adapter.modules for adapter in self.factors.values()))
        return frozenset(linear.name for linear in self.decoder.linears if not modules.isdisjoint(linear.modules))

    def _write_adapters(self) -> dict[str, str]:
        """The adapters' factors, once a variant is live: file by adapter."""
        if all(variant.live is None for variant in self.variants.values()):
            return {}
        files = {name: f"{name}.adapter.safetensors" for name in self.factors}
        for name, file in files.items():
            if not (self.folder / file).exists():
                write_file(self.folder / file, [pack_live_adapter(self.decoder, self.factors[name])])
        return files

    def _write_genai_config(self, graph: str) -> None:
        """For a merged default variant: a live one is the bare base for a reader that feeds no factors."""
        if self.variants[self.default_variant].live is not None:
            (self.folder / GENAI_CONFIG).unlink(missing_ok=True)
            return
        settings = {**self.base.config, **_generation_settings(self.base)}
        ends = end_tokens(self.base)
        write_file(self.folder / GENAI_CONFIG, [pack_genai_config(self.decoder, graph, settings=settings, end_tokens=ends)])

    def _write_graphs(self) -> dict[str, dict[str, GraphEntry]]:
        """Graphs by variant and target."""
        stems = {name: name if variant.live is None else _LIVE for name, variant in self.variants.items()}
        sources = {stem: name for name, stem in stems.items()}
        written: dict[str, dict[str, GraphEntry]] = {stem: {} for stem in sources}
        for target in self.targets:
            models = {stem: self._build_graph(name, target) for stem, name in sources.items()}
            stages = split_graphs(models, self.folder) if target == CPU.name else {}
            for stem, model in models.items():
                file = f"{stem}.{target}.onnx"
                write_file(self.folder / file, [pack_graph(model)])
                parts = tuple(
                    StageEntry(write_hashed(self.folder, pack_graph(stage), ".onnx"), mapped_blobs(stage))
                    for stage in stages.get(stem, ())
                )
                written[stem][target] = GraphEntry(file, mapped_blobs(model), parts)
        return {name: written[stem] for name, stem in stems.items()}

    def _build_graph(self, name: str, target: str) -> ir.Model:
        """The graph that a variant runs on; the live one's is that of all."""
        live = frozenset[str]() if self.variants[name].live is None else self._live_products()
        weights = self.weights_of(name)
        if TARGETS[target].float_type != CPU.float_type:
            weights = self._halves.halve(weights)
        return build_graph(self.decoder, weights, self.folder, live=live, target=TARGETS[target])


def describe_file(path: Path) -> FileEntry:
    """Size and hash of a file; a blob's name is its hash."""
    return FileEntry(path.stat().st_size, path.stem if path.suffix == BLOB else hash_file(path))


def describe_base(base: Base) -> BaseEntry:
    """Name and hash of a base."""
    return BaseEntry("".join(filter(str.isprintable, base.folder.resolve().name)), base.sha256)


def _describe_model(base: Base, decoder: Decoder) -> ModelEntry:
    return ModelEntry(
        architecture=decoder.architecture,
        hidden_size=decoder.hidden_size,
        layers=len(decoder.layers),
        kv_heads=decoder.kv_heads,
        head_size=decoder.head_size,
        vocab_size=decoder.vocab_size,
        context_length=decoder.context_length,
        eos_token_ids=end_tokens(base),
    )


def end_tokens(base: Base) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's where it has some, else config.json's."""
    ids = _generation_settings(base).get("eos_token_id")
    if ids is None:
        ids = base.config.get("eos_token_id")
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _generation_settings(base: Base) -> dict[str, Any]:
    path = base.folder / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return {key: value for key, value in settings.items() if value is not None}
