"""A bundle in the making: its variants' weights, and the writing of graphs and manifest, as often as something changes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgelora_export.embeddings import store_embeddings
from edgelora_export.genai_config import GENAI_CONFIG, pack_genai_config
from edgelora_export.graph import build_graph
from edgelora_export.live import live_slots, pack_live_adapter
from edgelora_export.progress import COMPENSATED
from edgelora_export.publish import BLOB, write_file
from edgelora_export.quantizing import compensates, store_products
from edgelora_export.store import Weights, read_linear, store_end, store_ends, store_norms, store_rounded, touches, touches_ends
from edgelora_runtime._version import __version__
from edgelora_runtime.bundle import hash_file
from edgelora_runtime.manifest import (
    MANIFEST,
    AdapterEntry,
    BaseEntry,
    CalibrationEntry,
    FidelityEntry,
    FileEntry,
    GraphEntry,
    Manifest,
    ModelEntry,
    QuantizationEntry,
    VariantEntry,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from edgelora_export.base import Base
    from edgelora_export.calibration import Calibration
    from edgelora_export.decoder import Decoder
    from edgelora_export.journal import Journal
    from edgelora_export.progress import Progress
    from edgelora_export.variants import LowRank, Quantization, Variant

TARGET = "cpu"
LIVE_GRAPH = f"live.{TARGET}.onnx"  # one graph serves all live variants; no variant may be called live


@dataclass
class Draft:
    """What `folder` holds so far.

    variants, in the bundle's order, may change: a merged one becomes live, products get more bits. adapters: what the
    manifest says of each. factors: the adapters that a live variant may use. base_calibration: what
    the bare base is quantized on. journal: what is finished of the products of variants as they were planned.
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
    shared: Weights | None = None
    bare: Weights | None = None
    weights: dict[str, Weights] = field(default_factory=dict)
    fidelity: dict[str, FidelityEntry] = field(default_factory=dict)

    @property
    def needs_bare(self) -> bool:
        """Whether some variant runs products of the bare base: all but merged ones that change every product do."""
        merged = [variant for variant in self.variants.values() if variant.live is None]
        return len(merged) < len(self.variants) or not all(
            touches(variant.delta, linear) for variant in merged for linear in self.decoder.linears
        )

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
                    *((item.delta, item.calibration) for item in self.variants.values() if item.delta),
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
                if touches_ends(variant.delta, self.decoder):
                    shared |= store_ends(self.base, self.decoder, variant.delta, self.folder, self.quantization)
                self.weights[name] = store_products(
                    self.base,
                    self.decoder,
                    variant.delta,
                    shared,
                    self.folder,
                    self.quantization,
                    self.journal.lane(name),
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
            delta, grid = self.variants[name].delta, quantization.grid(product)
            if product in linears:
                stored = store_rounded(self.folder, product, read_linear(self.base, linears[product], delta), grid)
            else:
                stored = store_end(self.base, self.decoder, product, delta, self.folder, grid)
            self.weights[name].take(stored)

    def make_live(self, name: str) -> None:
        """Gives up a merged variant's weights, and runs its mix beside the bare base's."""
        self.variants[name] = replace(self.variants[name], live=self.variants[name].mix)
        del self.weights[name]
        self.store_weights()

    def weights_of(self, name: str) -> Weights:
        """A variant's own weights; the bare base's for a live one and for one without a delta."""
        weights = self.weights.get(name, self.bare)
        assert weights is not None
        return weights

    def write(self) -> Manifest:
        """Writes graphs and manifest of what is stored, and removes the files that nothing uses any more."""
        graphs = self._write_graphs()
        files = self._write_adapters()
        self._write_genai_config(graphs[self.default_variant].file)
        used = {blob for entry in graphs.values() for blob in entry.blobs} | {entry.file for entry in graphs.values()}
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
            adapters={name: AdapterEntry(entry.sha256, entry.rank, files.get(name)) for name, entry in self.adapters.items()},
            live_slots=tuple(live_slots(linear) for linear in self.decoder.linears if linear.name in live),
            variants={name: self._describe_variant(variant, graphs[name]) for name, variant in self.variants.items()},
            files={path.name: describe_file(path) for path in sorted(self.folder.iterdir()) if path.name != MANIFEST},
        )
        write_file(self.folder / MANIFEST, [manifest.dump()])
        return manifest

    def _describe_variant(self, variant: Variant, graph: GraphEntry) -> VariantEntry:
        calibration = self.base_calibration if variant.delta is None or variant.live is not None else variant.calibration
        grids = self.weights_of(variant.name).grids
        return VariantEntry(
            kind="merged" if variant.live is None else "live",
            mix=dict(variant.mix),
            method=variant.method,
            graphs={TARGET: graph},
            live=dict(variant.live or {}),
            calibration=CalibrationEntry(dict(calibration.sources), calibration.fit_tokens) if calibration.fit else None,
            int8=tuple(name for name, grid in grids.items() if grid.bits == 8 and self.quantization.bits == 4),
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
        if graph == LIVE_GRAPH:
            (self.folder / GENAI_CONFIG).unlink(missing_ok=True)
            return
        settings = {**self.base.config, **_generation_settings(self.base)}
        ends = end_tokens(self.base)
        write_file(self.folder / GENAI_CONFIG, [pack_genai_config(self.decoder, graph, settings=settings, end_tokens=ends)])

    def _write_graphs(self) -> dict[str, GraphEntry]:
        entries: dict[str, GraphEntry] = {}
        written: dict[str, GraphEntry] = {}
        for name, variant in self.variants.items():
            live = variant.live is not None
            file = LIVE_GRAPH if live else f"{name}.{TARGET}.onnx"
            if file not in written:
                weights = self.weights_of(name)
                model = build_graph(self.decoder, weights, self.folder, live=self._live_products() if live else frozenset[str]())
                write_file(self.folder / file, [ir.serde.serialize_model(model).SerializeToString()])
                written[file] = GraphEntry(file, tuple(sorted({tensor.location for tensor in weights.tensors.values()})))
            entries[name] = written[file]
        return entries


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
