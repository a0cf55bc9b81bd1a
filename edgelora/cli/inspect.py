"""`edgelora inspect` and `edgelora verify`: shows a bundle or an adapter, and checks a bundle's bytes against its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import BundleArgument, JsonOption  # noqa: TC001  (typer reads the annotations)
from edgelora.cli.terminal import print_json, print_line, print_next, print_table, quote_path, show_progress
from edgelora.formatting import format_bytes, format_share

InspectedArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder, or an adapter's folder or GGUF file.")
]

if TYPE_CHECKING:
    from edgelora.inspection import TextsDescription, VariantDescription
    from edgelora_runtime import Bundle
    from edgelora_runtime.bundle.manifest import FidelityEntry, RouterEntry


def inspect(bundle: InspectedArgument, json: JsonOption = False) -> None:
    """Show a bundle's variants, their mixes and sizes, and what each keeps of its adapters. Or show an adapter."""
    from edgelora.inspection import is_adapter
    from edgelora_runtime import Bundle

    if is_adapter(bundle):
        _show_adapter(bundle, as_json=json)
        return
    show_bundle(Bundle.open(bundle), as_json=json)
    if not json:
        print_next(f'edgelora run {quote_path(bundle)} "…" --variant NAME, or edgelora verify {quote_path(bundle)}')


def verify(bundle: BundleArgument, json: JsonOption = False) -> None:
    """Check every byte of a bundle against its manifest. If files differ, name them and exit with code 4."""
    from edgelora_runtime import Bundle

    with show_progress("verifying") as on_progress:
        done = 0

        def count(name: str) -> None:
            nonlocal done
            done += 1
            on_progress(done, len(list(bundle.iterdir())) - 1, name)  # the manifest lists all files but itself

        opened = Bundle.open(bundle, verify="full", on_file=count)
    size = sum(entry.size for entry in opened.manifest.files.values())
    if json:
        print_json({"bundle": bundle, "files": len(opened.manifest.files), "bytes": size, "ok": True})
    else:
        print_line(f"{bundle}: {len(opened.manifest.files)} files, {format_bytes(size)}, all as listed")
        print_next(f'edgelora run {quote_path(bundle)} "…"')


def show_bundle(bundle: Bundle, *, as_json: bool) -> None:
    """Prints a bundle's description as tables, or as one JSON object."""
    from edgelora.inspection import describe_bundle

    described = describe_bundle(bundle)
    if as_json:
        print_json(described)
        return
    model, grid = described.model, described.quantization
    stored = "float32" if grid.bits == 32 else f"int{grid.bits}, block {grid.block_size}, {grid.method}"
    base = f"base {described.base.name} ({described.base.sha256[:12]})"
    print_line(f"{bundle.folder}: {model.architecture}, {model.layers} layers, {base}, {stored}")
    rows = [
        [
            item.name + (" *" if item.name == described.default_variant else ""),
            item.kind,
            " + ".join(f"{name} by module" if name in item.weights else f"{w:g} {name}" for name, w in item.mix.items()) or "–",
            item.method if item.mix else "–",
            _describe_merge_base(item),
            format_bytes(item.bytes),
            format_bytes(item.private_bytes),
        ]
        for item in described.variants
    ]
    print_table("", ["variant", "kind", "mix", "method", "merged into", "bytes", "of its own"], rows)
    for item in described.variants:
        if said := _describe_vocab(item):
            print_line(f"{item.name}: {said}")
    measured = [(item, item.fidelity) for item in described.variants if item.fidelity is not None]
    if measured:
        kernels = " and ".join(sorted({found.kernels for _, found in measured}))
        print_table(
            f"KL from the unmerged adapter on the float base, and on its trained base; nats per token, by kernels of {kernels}",
            [
                "variant",
                "gate",
                "adapter kept",
                "KL mean",
                "KL p99",
                "KL trained",
                "top-1",
                "answers",
                "perplexity",
                "unmerged's",
                "int8",
            ],
            [_list_figures(item, found) for item, found in measured],
        )
    print_line(f"answers end at {_list_ends(described.texts)}")
    for item in described.variants:
        if item.texts is not None:
            own = " and ".join(item.texts.own) or "end tokens"
            print_line(f"{item.name} has its adapter's own {own}; its answers end at {_list_ends(item.texts)}")
    if described.router is not None:
        _show_router(described.router)
    print_line(f"{format_bytes(described.bytes)} on disk, {format_bytes(described.shared_bytes)} shared; * is the default")


def _show_adapter(path: Path, *, as_json: bool) -> None:
    from edgelora.inspection import describe_adapter

    found = describe_adapter(path)
    if as_json:
        print_json(found)
        return
    base = f"base {found.base or 'unknown'}, held as {found.trained_on or 'unknown'} in training"
    print_line(f"{path}: {found.form} adapter, rank {found.rank}, {len(found.modules)} modules, {base}")
    if found.biased:
        print_line(f"adds to {len(found.biased)} biases")
    if found.vocab_size is not None:
        print_line(f"brings a vocabulary of {found.vocab_size} rows")
    for note in found.notes:
        print_line(f"note: {note}")
    print_next("edgelora init, which writes a recipe of the adapters in this folder")


def _list_ends(texts: TextsDescription) -> str:
    return ", ".join(f"{text} ({token})" for token, text in texts.end_tokens.items()) or "no token"


def _show_router(router: RouterEntry) -> None:
    rows = [
        [each.variant or "anything else", str(each.prompts), str(each.held_out), format_share(each.accuracy)]
        for each in router.classes
    ]
    limit = f", and for a confidence below {router.threshold:g}" if router.threshold else ""
    print_table(
        f"router: variant 'auto' picks by the prompt; {router.fallback} for anything else{limit}",
        ["variant", "prompts learnt from", "held out", "of these to their own %"],
        [*rows, ["mean", "", "", format_share(router.accuracy)]],
    )


def _describe_merge_base(item: VariantDescription) -> str:
    """Names the base that a mix was merged into, and the loss on each base tried."""
    if item.kind == "live" or not item.mix:
        return "–"
    name = f"trained, {item.trained_on}" if item.merge_base == "trained" else item.merge_base
    losses = [f"{base} {loss:.4g}" for base, loss in item.merge_losses.items()]
    return f"{name} (loss: {', '.join(losses)})" if losses else name


def _describe_vocab(item: VariantDescription) -> str:
    """Says in which ways a variant's vocabulary is not the base's. Returns "" if it is."""
    own = f"own {' and '.join(item.own_vocab)}" if item.own_vocab else ""
    return ", ".join(part for part in ("" if item.vocab_size is None else f"vocabulary {item.vocab_size}", own) if part)


def _list_figures(item: VariantDescription, found: FidelityEntry) -> list[str]:
    return [
        item.name,
        found.outcome,
        "–" if found.retention is None else f"{found.retention:.4f}",
        f"{found.kl_mean:.2g}",
        f"{found.kl_p99:.2g}",
        "–" if found.trained_kl is None else f"{found.trained_kl:.2g}",
        f"{found.top1:.3f}",
        f"{found.answers_kept} of {found.answers}" if found.answers else "–",
        f"{found.perplexity:.3f}",
        f"{found.teacher_perplexity:.3f}",
        str(len(item.int8)),
    ]
