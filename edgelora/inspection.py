"""Describes a bundle: variant sizes, shared bytes, and the manifest's figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_runtime.bundle.tokenizer import CHAT_TEMPLATE, TOKENIZER, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
    bundle's own.
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
        own = [
            what
            for what, file, usual in (
                ("tokenizer", entry.tokenizer, TOKENIZER),
                ("chat template", entry.chat_template, CHAT_TEMPLATE),
            )
            if file not in (usual, None)
        ]
    return TextsDescription(tuple(own), {token: tokenizer.name_token(token) for token in ids})
