"""Makes the manifest's entries for a bundle's base, model, files and variants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from edgelora_export.plan.calibration import Calibration
from edgelora_export.weights.publish import BLOB
from edgelora_runtime.bundle.folder import hash_file, is_left_by_system
from edgelora_runtime.bundle.manifest import (
    MANIFEST,
    BaseEntry,
    CalibrationEntry,
    FileEntry,
    ModelEntry,
    QuantizationEntry,
    VariantEntry,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgelora_export.base.base import Base
    from edgelora_export.bundle.plan import BundlePlan
    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.variants import Quantization, Variant
    from edgelora_export.weights.stored import StoredWeights
    from edgelora_runtime.bundle.manifest import FidelityEntry, GraphEntry

_VOCAB: tuple[Literal["embedding"], Literal["head"]] = ("embedding", "head")


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Returns size and hash of every file except the manifest. A blob's name is its hash."""
    return {
        path.name: FileEntry(path.stat().st_size, path.stem if path.suffix == BLOB else hash_file(path))
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST and not is_left_by_system(path.name)
    }


def describe_base(base: Base) -> BaseEntry:
    """Returns name and hash of a base."""
    return BaseEntry("".join(filter(str.isprintable, base.name)), base.sha256)


def describe_model(decoder: Decoder, end_tokens: tuple[int, ...]) -> ModelEntry:
    """Returns the sizes by which a runtime makes inputs and outputs, and the tokens that end an answer."""
    return ModelEntry(
        architecture=decoder.architecture,
        hidden_size=decoder.hidden_size,
        layers=len(decoder.layers),
        kv_heads=decoder.kv_heads,
        head_size=decoder.head_size,
        vocab_size=decoder.vocab_size,
        context_length=decoder.context_length,
        eos_token_ids=end_tokens,
    )


def describe_quantization(quantization: Quantization) -> QuantizationEntry:
    """Returns the grid and the method of a bundle's weights."""
    return QuantizationEntry(quantization.bits, quantization.block_size, quantization.symmetric, quantization.method)


def name_own_vocab(plan: BundlePlan, variant: Variant) -> tuple[Literal["embedding", "head"], ...]:
    """Names what a variant has for itself of embedding and head. One tied matrix is both."""
    own = plan.find_own_matrices(variant)
    return ("embedding", "head") if own and plan.decoder_of(variant).tied else tuple(each for each in _VOCAB if each in own)


def describe_variant(
    plan: BundlePlan,
    variant: Variant,
    weights: StoredWeights,
    graphs: Mapping[str, GraphEntry],
    fidelity: FidelityEntry | None,
) -> VariantEntry:
    """Returns the entry of a variant as it was built. graphs: by target."""
    decoder = plan.decoder_of(variant)
    calibration = plan.base_calibration if variant.delta is None or variant.live is not None else variant.calibration
    if variant.keeps_codes:
        calibration = Calibration()
    raised = tuple(name for name, grid in weights.grids.items() if grid.bits == 8 and plan.quantization.bits == 4)
    return VariantEntry(
        kind="merged" if variant.live is None else "live",
        mix=dict(variant.mix),
        method=variant.method,
        weights={name: dict(by_pattern) for name, by_pattern in variant.weights.items()},
        density=variant.density,
        seed=variant.seed,
        graphs=dict(graphs),
        live=dict(variant.live or {}),
        calibration=CalibrationEntry(dict(calibration.sources), calibration.fit_tokens) if calibration.fit else None,
        int8=raised,
        merge_base="trained" if variant.merge_base == "trained" else "float",
        trained_on=None if variant.trained is None else variant.trained.quantization,
        merge_losses=dict(variant.merge_losses),
        fidelity=fidelity,
        vocab_size=None if decoder.vocab_size == plan.decoder.vocab_size else decoder.vocab_size,
        own_vocab=name_own_vocab(plan, variant),
        texts=plan.texts.describe(variant.mix),
    )
