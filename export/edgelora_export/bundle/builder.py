"""Builds a bundle: streams the base layer by layer, writes each distinct weight once, judges the variants, publishes."""

from __future__ import annotations

import json
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from edgelora_export.architectures import read_decoder
from edgelora_export.bundle.draft import Draft
from edgelora_export.bundle.gate import Gate, judge, judged
from edgelora_export.bundle.merge_base import choose_merge_base
from edgelora_export.bundle.progress import Progress
from edgelora_export.plan.calibration import Calibration
from edgelora_export.plan.targets import CPU, check_targets
from edgelora_export.weights.journal import Journal
from edgelora_export.weights.publish import journal_of, staged_folder, write_file, write_hashed
from edgelora_export.weights.store import check_modules
from edgelora_runtime.bundle.draft_table import DRAFT_TABLE
from edgelora_runtime.bundle.manifest import MANIFEST, AdapterEntry, Manifest, check_variant_name
from edgelora_runtime.bundle.tokenizer import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgelora_export.bundle.progress import OnProgress
    from edgelora_export.decoder.description import Decoder
    from edgelora_export.plan.variants import LowRank, PackedRouter, Quantization, Variant
    from edgelora_export.weights.base import Base

_COPIED = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, "config.json", "generation_config.json")


def build_bundle(
    base: Base,
    variants: Sequence[Variant],
    output: Path,
    *,
    quantization: Quantization,
    adapters: Mapping[str, AdapterEntry],
    live_adapters: Mapping[str, LowRank],
    base_calibration: Calibration | None = None,
    gate: Gate | None = None,
    default_variant: str | None = None,
    context_length: int | None = None,
    targets: Sequence[str] = (CPU.name,),
    plan: str | None = None,
    router: PackedRouter | None = None,
    draft_tables: Mapping[str, bytes] = MappingProxyType({}),
    on_progress: OnProgress = lambda done, total, what: None,
) -> Manifest:
    """Writes the bundle folder in one step: a reader sees the old one or the new one, never a part.

    adapters: what the manifest says of each (its file is filled in here). live_adapters: factors by adapter name, for live
    variants and for those that the gate turns live. base_calibration: what the bare base is quantized on. gate: what
    variants must keep of their adapters; None measures nothing. context_length: see read_decoder. targets: what each
    variant gets a graph for, see targets.py; cpu must be among them. plan: one line that two calls share only if they make the
    same weights; the second then takes over what the first had finished when it was killed. router: what picks a variant for
    a prompt. draft_tables: files of them by adapter. on_progress(done, total, what) is called per layer.
    Raises InputError for names, modules or settings that cannot be built, ResourceError for a full disk, IntegrityError
    where a variant does not pass the gate.
    """
    check_targets(targets)
    decoder = read_decoder(base.config, context_length)
    _check(variants, decoder, quantization, live_adapters)
    with staged_folder(output, marker=MANIFEST, plan=plan) as folder:
        copy_texts(base, folder)
        if router is not None:
            write_file(folder / router.entry.file, [router.content])
        tables = {name: write_hashed(folder, table, DRAFT_TABLE) for name, table in draft_tables.items()}
        draft = Draft(
            base=base,
            decoder=decoder,
            folder=folder,
            default_variant=variants[0].name if default_variant is None else default_variant,
            quantization=quantization,
            variants={variant.name: variant for variant in variants},
            adapters={name: replace(entry, drafts=tables.get(name)) for name, entry in adapters.items()},
            factors=live_adapters,
            base_calibration=base_calibration or Calibration(),
            progress=Progress(on_progress, len(decoder.layers)),
            journal=Journal(None if plan is None else journal_of(folder), folder),
            targets=targets,
            router=None if router is None else router.entry,
        )
        draft.expect_progress()
        if gate is not None:
            draft.progress.expect(len(judged(draft)))
        for name, variant in draft.variants.items():
            draft.progress.show(f"choosing the base of {name}")
            draft.variants[name] = choose_merge_base(base, decoder, variant)
        draft.store_weights()
        manifest = draft.write(final=True) if gate is None else judge(draft, gate)
        draft.progress.finish("written")
    return manifest


def check_names(variants: Sequence[Variant]) -> None:
    """Refuses a bundle without variants, and names that cannot be a variant's or would be one file's."""
    if not variants:
        raise InputError("the recipe names no variant; add at least [variants.base] with mix = {}")
    seen: set[str] = set()
    for variant in variants:
        if reason := check_variant_name(variant.name):
            raise InputError(f"variant {variant.name!r}: {reason}")
        if variant.name.lower() in seen:
            raise InputError(f"variant {variant.name!r} stands twice; two names must differ in more than case, so rename one")
        seen.add(variant.name.lower())


def _check(
    variants: Sequence[Variant], decoder: Decoder, quantization: Quantization, live_adapters: Mapping[str, LowRank]
) -> None:
    check_names(variants)
    for variant in variants:
        if variant.delta is not None:
            check_modules(decoder, variant.delta.modules, f"variant {variant.name}", ends=True)
    for name, adapter in live_adapters.items():
        check_modules(decoder, adapter.modules, f"adapter {name}")
    folded = [name.lower() for name in live_adapters]
    if twice := sorted({name for name in live_adapters if folded.count(name.lower()) > 1}):
        raise InputError(f"adapters {', '.join(twice)} differ only in case, and so would their files; rename one")
    products = [linear.name for linear in decoder.linears] + ["embedding"] + ([] if decoder.tied else ["head"])
    if idle := quantization.idle_patterns(products):
        raise InputError(f"int8 = {', '.join(idle)}: no product is called so; there are {products[0]} … and {products[-1]}")


def copy_texts(base: Base, folder: Path) -> None:
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
