"""Builds a bundle: streams the base product by product, writes each distinct weight once, then graphs, then the manifest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgelora_export.architectures import read_decoder
from edgelora_export.genai_config import GENAI_CONFIG, pack_genai_config
from edgelora_export.graph import Grid, build_graph
from edgelora_export.live import live_slots, pack_live_adapter
from edgelora_export.publish import staged_folder, write_file
from edgelora_export.store import Tensors, check_modules, store_ends, store_linear, store_shared, touches, touches_ends
from edgelora_runtime._version import __version__
from edgelora_runtime.bundle import hash_file
from edgelora_runtime.errors import InputError
from edgelora_runtime.manifest import (
    MANIFEST,
    AdapterEntry,
    BaseEntry,
    FileEntry,
    GraphEntry,
    Manifest,
    ModelEntry,
    QuantizationEntry,
    VariantEntry,
    check_variant_name,
)
from edgelora_runtime.tokenizer import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from edgelora_export.base import Base
    from edgelora_export.decoder import Decoder
    from edgelora_export.variants import LowRank, Quantization, Variant

TARGET = "cpu"
LIVE_GRAPH = f"live.{TARGET}.onnx"  # one graph serves all live variants; no variant may be called live
_COPIED = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, "config.json", "generation_config.json")


def build_bundle(
    base: Base,
    variants: Sequence[Variant],
    output: Path,
    *,
    quantization: Quantization,
    adapters: Mapping[str, AdapterEntry],
    live_adapters: Mapping[str, LowRank],
    default_variant: str | None = None,
    context_length: int | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Manifest:
    """Writes the bundle folder in one step: a reader sees the old one or the new one, never a part.

    adapters: what the manifest says of each (its file is filled in here). live_adapters: factors by adapter name, for the
    names that live variants use. context_length: see read_decoder. on_progress(done, total, what) is called per product.
    Peak memory is about four times the largest weight in float32, or the embedding.
    Raises InputError for names, modules or settings that cannot be built, ResourceError for a full disk.
    """
    decoder = read_decoder(base.config, context_length)
    _check(variants, decoder, live_adapters)
    if default_variant is None:
        default_variant = variants[0].name
    with staged_folder(output, marker=MANIFEST) as folder:
        _copy_texts(base, folder)
        files = {name: _write_adapter(folder, name, decoder, adapter) for name, adapter in live_adapters.items()}
        stored = _store_weights(base, decoder, variants, folder, quantization, on_progress)
        graphs = _write_graphs(decoder, variants, stored, folder, quantization, live_adapters)
        _write_genai_config(base, decoder, graphs[default_variant].file, folder)
        manifest = Manifest(
            created_by=f"edgelora {__version__}",
            default_variant=default_variant,
            base=BaseEntry("".join(filter(str.isprintable, base.folder.resolve().name)), base.sha256),
            model=_describe_model(base, decoder),
            quantization=QuantizationEntry(
                quantization.bits, quantization.block_size, quantization.symmetric, quantization.method
            ),
            adapters={name: AdapterEntry(entry.sha256, entry.rank, files.get(name)) for name, entry in adapters.items()},
            live_slots=tuple(
                live_slots(linear) for linear in decoder.linears if linear.name in _live_names(decoder, live_adapters)
            ),
            variants={
                variant.name: VariantEntry(
                    kind="merged" if variant.live is None else "live",
                    mix=dict(variant.mix),
                    method=variant.method,
                    graphs={TARGET: graphs[variant.name]},
                    live=dict(variant.live or {}),
                )
                for variant in variants
            },
            files={path.name: FileEntry(path.stat().st_size, hash_file(path)) for path in sorted(folder.iterdir())},
        )
        write_file(folder / MANIFEST, [manifest.dump()])
    return manifest


def _check(variants: Sequence[Variant], decoder: Decoder, live_adapters: Mapping[str, LowRank]) -> None:
    if not variants:
        raise InputError("the recipe names no variant; add at least [variants.base] with mix = {}")
    seen: set[str] = set()
    for variant in variants:
        if reason := check_variant_name(variant.name):
            raise InputError(f"variant {variant.name!r}: {reason}")
        if variant.name.lower() in seen:
            raise InputError(f"variant {variant.name!r} stands twice; two names must differ in more than case, so rename one")
        seen.add(variant.name.lower())
        if variant.delta is not None:
            check_modules(decoder, variant.delta.modules, f"variant {variant.name}", ends=True)
    for name, adapter in live_adapters.items():
        check_modules(decoder, adapter.modules, f"adapter {name}")
    folded = [name.lower() for name in live_adapters]
    if twice := sorted({name for name in live_adapters if folded.count(name.lower()) > 1}):
        raise InputError(f"adapters {', '.join(twice)} differ only in case, and so would their files; rename one")


def _copy_texts(base: Base, folder: Path) -> None:
    """Copies the tokenizer and the configs; a chat template inside tokenizer_config.json gets its own file."""
    if not (base.folder / TOKENIZER).is_file():
        raise InputError(f"base {base.folder} has no {TOKENIZER}; save its fast tokenizer there (save_pretrained does)")
    for name in _COPIED:
        if (base.folder / name).is_file():
            write_file(folder / name, [(base.folder / name).read_bytes()])
    if not (folder / CHAT_TEMPLATE).exists() and (folder / TOKENIZER_CONFIG).exists():
        template = json.loads((folder / TOKENIZER_CONFIG).read_bytes()).get("chat_template")
        if isinstance(template, str):
            write_file(folder / CHAT_TEMPLATE, [template.encode()])


def _write_adapter(folder: Path, name: str, decoder: Decoder, adapter: LowRank) -> str:
    file = f"{name}.adapter.safetensors"
    write_file(folder / file, [pack_live_adapter(decoder, adapter)])
    return file


def _store_weights(
    base: Base,
    decoder: Decoder,
    variants: Sequence[Variant],
    folder: Path,
    quantization: Quantization,
    on_progress: Callable[[int, int, str], None],
) -> dict[str, Tensors]:
    """Tensors of each merged variant, and under "" those of the bare base that live variants run on."""
    merged = [variant for variant in variants if variant.live is None]
    linears = list(decoder.linears)
    total = len(linears) + 1
    on_progress(0, total, "embedding")
    shared = store_shared(base, decoder, folder)
    if len(merged) < len(variants) or not all(touches_ends(variant.delta, decoder) for variant in merged):
        shared |= store_ends(base, decoder, None, folder, quantization)
    stored = {name: dict(shared) for name in ("", *(variant.name for variant in merged))}
    for variant in merged:
        if touches_ends(variant.delta, decoder):
            stored[variant.name] |= store_ends(base, decoder, variant.delta, folder, quantization)
    for done, linear in enumerate(linears, start=1):
        on_progress(done, total, linear.name)
        # The bare product is needed unless every variant is merged and changes it.
        if len(merged) < len(variants) or not all(touches(variant.delta, linear) for variant in merged):
            bare = store_linear(base, linear, None, folder, quantization)
            stored[""] |= bare
        for variant in merged:
            if touches(variant.delta, linear):
                stored[variant.name] |= store_linear(base, linear, variant.delta, folder, quantization)
            else:
                stored[variant.name] |= bare
    on_progress(total, total, "graphs")
    return stored


def _live_names(decoder: Decoder, live_adapters: Mapping[str, LowRank]) -> frozenset[str]:
    modules = frozenset[str]().union(*(adapter.modules for adapter in live_adapters.values()))
    return frozenset(linear.name for linear in decoder.linears if not modules.isdisjoint(linear.modules))


def _write_graphs(
    decoder: Decoder,
    variants: Sequence[Variant],
    stored: Mapping[str, Tensors],
    folder: Path,
    quantization: Quantization,
    live_adapters: Mapping[str, LowRank],
) -> dict[str, GraphEntry]:
    grid = None if quantization.bits == 32 else Grid(quantization.bits, quantization.block_size)
    entries: dict[str, GraphEntry] = {}
    written: dict[str, GraphEntry] = {}
    for variant in variants:
        live = variant.live is not None
        file = LIVE_GRAPH if live else f"{variant.name}.{TARGET}.onnx"
        if file not in written:
            tensors = stored["" if live else variant.name]
            slots = _live_names(decoder, live_adapters) if live else frozenset[str]()
            model = build_graph(decoder, tensors, folder, grid=grid, live=slots)
            write_file(folder / file, [ir.serde.serialize_model(model).SerializeToString()])
            written[file] = GraphEntry(file, tuple(sorted({tensor.location for tensor in tensors.values()})))
        entries[variant.name] = written[file]
    return entries


def _write_genai_config(base: Base, decoder: Decoder, graph: str, folder: Path) -> None:
    """For a merged default variant: a live one without the factors, which onnxruntime-genai does not feed, is the bare base."""
    if graph != LIVE_GRAPH:
        settings = {**base.config, **_generation_settings(base)}
        write_file(folder / GENAI_CONFIG, [pack_genai_config(decoder, graph, settings=settings, end_tokens=_end_tokens(base))])


def _describe_model(base: Base, decoder: Decoder) -> ModelEntry:
    return ModelEntry(
        architecture=decoder.architecture,
        hidden_size=decoder.hidden_size,
        layers=len(decoder.layers),
        kv_heads=decoder.kv_heads,
        head_size=decoder.head_size,
        vocab_size=decoder.vocab_size,
        context_length=decoder.context_length,
        eos_token_ids=_end_tokens(base),
    )


def _end_tokens(base: Base) -> tuple[int, ...]:
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
