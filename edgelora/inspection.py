"""Describes a bundle, by variant sizes, shared bytes and the manifest's figures, and an adapter."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_runtime.bundle.chat_template import list_own_templates
from edgelora_runtime.bundle.manifest import MANIFEST
from edgelora_runtime.bundle.tokenizer import TOKENIZER, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgelora_runtime import Bundle
    from edgelora_runtime.bundle.manifest import (
        BaseEntry,
        CalibrationEntry,
        FidelityEntry,
        ModelEntry,
        QuantizationEntry,
        RouterEntry,
        TextsEntry,
        VariantEntry,
    )


@dataclass(frozen=True)
class TextsDescription:
    """The text side of a bundle, or of a variant whose adapter brought its own.

    own: what it has in place of the bundle's: "tokenizer", "chat template". end_tokens: the tokens that end an answer, by id.
    """

    own: tuple[str, ...]
    end_tokens: Mapping[int, str]


@dataclass(frozen=True)
class VariantDescription:
    """A variant: its size, and its figures from the manifest.

    bytes: everything that it maps, adapters included. private_bytes: the part that no other variant maps. texts: None for the
    bundle's own. vocab_size, own_vocab: see VariantEntry.
    """

    name: str
    kind: str
    mix: Mapping[str, float]
    weights: Mapping[str, Mapping[str, float]]
    method: str
    density: float | None
    seed: int | None
    bytes: int
    private_bytes: int
    merge_base: str
    trained_on: str | None
    merge_losses: Mapping[str, float]
    int8: Sequence[str]
    calibration: CalibrationEntry | None
    fidelity: FidelityEntry | None
    vocab_size: int | None = None
    own_vocab: Sequence[str] = ()
    texts: TextsDescription | None = None


@dataclass(frozen=True)
class BundleDescription:
    """A bundle.

    bytes: size of all files. shared_bytes: size of the files that more than one variant maps.
    """

    bytes: int
    shared_bytes: int
    default_variant: str
    base: BaseEntry
    model: ModelEntry
    quantization: QuantizationEntry
    variants: tuple[VariantDescription, ...]
    router: RouterEntry | None
    texts: TextsDescription


@dataclass(frozen=True)
class AdapterDescription:
    """An adapter.

    form: PEFT, MLX or GGUF. rank: the largest over the modules. base: the name that its config gives, None if it gives none.
    trained_on: nf4, int4, none or mixed, None if nothing tells. biased: modules to whose bias it adds. vocab_size: rows of the
    embedding and the head that it brings. notes: what its config names and its file lacks.
    """

    path: Path
    sha256: str
    form: str
    base: str | None
    trained_on: str | None
    rank: int
    modules: tuple[str, ...]
    biased: tuple[str, ...]
    vocab_size: int | None
    notes: tuple[str, ...]


def is_adapter(path: Path) -> bool:
    """True for a GGUF file, and for a folder with an adapter's config that is no bundle."""
    return path.suffix == ".gguf" or ((path / "adapter_config.json").is_file() and not (path / MANIFEST).exists())


def describe_adapter(path: Path) -> AdapterDescription:
    """Describes an adapter. Raises InputError for one that cannot be used."""
    from edgelora.adapters.folder import Adapter

    adapter = Adapter.open(path)
    base = adapter.config.get("base_model_name_or_path")
    return AdapterDescription(
        path,
        adapter.sha256,
        adapter.source.form,
        None if base is None else "".join(filter(str.isprintable, str(base))),
        adapter.trained_on,
        adapter.rank,
        tuple(sorted(adapter.modules)),
        tuple(sorted(adapter.biased)),
        adapter.vocab_size,
        adapter.notes,
    )


def describe_bundle(bundle: Bundle) -> BundleDescription:
    """Describes a bundle from its manifest, and counts each variant's mapped bytes."""
    manifest = bundle.manifest
    sizes = {name: entry.size for name, entry in manifest.files.items()}

    def mapped(variant: VariantEntry) -> set[str]:
        graphs = {name for graph in variant.graphs.values() for name in (graph.file, *graph.blobs)}
        return graphs | {file for name in variant.live if (file := manifest.adapters[name].file) is not None}

    files = {name: mapped(variant) for name, variant in manifest.variants.items()}
    users = Counter(file for used in files.values() for file in used)
    return BundleDescription(
        bytes=sum(sizes.values()),
        shared_bytes=sum(sizes[file] for file, count in users.items() if count > 1),
        default_variant=manifest.default_variant,
        base=manifest.base,
        model=manifest.model,
        quantization=manifest.quantization,
        variants=tuple(
            VariantDescription(
                name,
                variant.kind,
                variant.mix,
                variant.weights,
                variant.method,
                variant.density,
                variant.seed,
                sum(sizes[file] for file in files[name]),
                sum(sizes[file] for file in files[name] if users[file] == 1),
                variant.merge_base,
                variant.trained_on,
                variant.merge_losses,
                variant.int8,
                variant.calibration,
                variant.fidelity,
                variant.vocab_size,
                variant.own_vocab,
                None if variant.texts is None else _describe_texts(bundle, variant.texts),
            )
            for name, variant in manifest.variants.items()
        ),
        router=manifest.router,
        texts=_describe_texts(bundle, None),
    )


def _describe_texts(bundle: Bundle, entry: TextsEntry | None) -> TextsDescription:
    tokenizer = Tokenizer(bundle, entry)
    ids = bundle.manifest.model.eos_token_ids if entry is None else entry.eos_token_ids
    own = []
    if entry is not None:
        differs = {
            "tokenizer": entry.tokenizer != TOKENIZER,
            "chat template": len(list_own_templates(entry.chat_templates)) < len(entry.chat_templates),
        }
        own = [what for what, is_own in differs.items() if is_own]
    return TextsDescription(tuple(own), {token: tokenizer.name_token(token) for token in ids})
