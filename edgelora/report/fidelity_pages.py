"""The pages of `edgelora export --report`: an index, and a page per measured variant."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from edgelora.formatting import format_bytes
from edgelora.inspection import describe_bundle
from edgelora.report.elements import element, join
from edgelora.report.page import NONE, render_chip, render_note, render_page, render_section, render_table
from edgelora.report.pictures import Bar, draw_bars
from edgelora.report.variant_page import INDEX, format_kept, name_mix, render_variant
from edgelora_export.weights.publish import write_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from edgelora.inspection import BundleDescription, VariantDescription
    from edgelora.report.elements import Html
    from edgelora_runtime import Bundle
    from edgelora_runtime.bundle.manifest import FidelityEntry

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_UNITS = ("bytes", "KiB", "MiB", "GiB")
_COLUMNS = ("variant", "mix", "outcome", "adapter kept", "KL mean", "KL p99", "same top token", "size", "of its own")


def write_fidelity(bundle: Bundle, folder: Path) -> list[Path]:
    """Writes index.html and a page for each measured variant into a folder.

    Returns their paths, the index first.
    """
    pages = render_fidelity(bundle.folder.resolve().name, describe_bundle(bundle))
    folder.mkdir(parents=True, exist_ok=True)
    for file, page in pages.items():
        write_file(folder / file, [page.encode(errors="replace")])
    return [folder / file for file in pages]


def render_fidelity(bundle: str, described: BundleDescription) -> dict[str, Html]:
    """The HTML of each page by its file name. bundle: its name."""
    measured = [(item, item.fidelity) for item in described.variants if item.fidelity is not None]
    files = name_files(item.name for item, _ in measured)
    pages = {INDEX: render_index(bundle, described, files)}
    for item, found in measured:
        pages[files[item.name]] = render_variant(bundle, item, found)
    return pages


def name_files(variants: Iterable[str]) -> dict[str, str]:
    """Names a file for each variant's page.

    Names are safe in a link, and unique even on disks that ignore case.
    """
    files: dict[str, str] = {}
    taken = {INDEX}
    for variant in variants:
        stem = _UNSAFE.sub("_", variant)
        names = itertools.chain([f"{stem}.html"], (f"{stem}-{place}.html" for place in itertools.count(2)))
        files[variant] = next(name for name in names if name.lower() not in taken)
        taken.add(files[variant].lower())
    return files


def render_index(bundle: str, described: BundleDescription, files: Mapping[str, str]) -> Html:
    """Renders the page that compares all variants.

    files: the page of each variant that has one.
    """
    grid = described.quantization
    weights = "float32 weights" if grid.bits == 32 else f"int{grid.bits} weights ({grid.method}, blocks of {grid.block_size})"
    model = join(
        (f"{described.model.architecture} with {described.model.layers} layers, base ", element("b", described.base.name))
    )
    rows = [_list_variant(item, described.default_variant, files.get(item.name)) for item in described.variants]
    parts = [
        render_table("Variants", _COLUMNS, rows, figures=range(3, len(_COLUMNS))),
        render_note(
            "KL: divergence from the unmerged adapter on the float base, in nats per token, the mean and the 99th percentile. "
            "Adapter kept: 1 − the variant's KL / the bare base's KL; 1 keeps the whole adapter. "
            "Same top token: share of tokens for which both find the same next token likeliest. "
            "Size: all files that the variant loads. Of its own: those that no other variant loads."
        ),
    ]
    kept = [
        (item.name, found.retention) for item in described.variants if (found := item.fidelity) and found.retention is not None
    ]
    if kept:
        parts.append(
            draw_bars(
                "Adapter kept",
                "How much of what the adapters change in the model's predictions is left after quantization. Longer is better.",
                "share; 1 is the whole adapter",
                [Bar(name, share, f"{share:.4f}", "kept") for name, share in kept],
                {"kept": "kept"},
                most=1.0,
            )
        )
    return render_page(
        f"What the variants of “{bundle}” keep of their adapters",
        join((model, f", {weights}. {_count_measured(len(files), len(described.variants))}")),
        render_section("variants", "Variants", *parts),
        render_section("bytes", "Bytes on disk", _draw_bytes(described)),
        context="edgelora",
    )


def _count_measured(measured: int, variants: int) -> str:
    if not measured:
        return "No variant was measured: the gate was off, or there was no held-out text."
    return f"{measured} of {variants} variants were measured on held-out text, against their unmerged adapters on the float base."


def _list_variant(item: VariantDescription, default: str, file: str | None) -> list[str]:
    """A row of the index's table."""
    found = item.fidelity
    name = element("a", item.name, href=file) if file else item.name
    figures = [NONE] * 4
    if found is not None:
        figures = [format_kept(found), f"{found.kl_mean:.4f}", f"{found.kl_p99:.4f}", f"{found.top1:.4f}"]
    return [
        join((name, element("small", "default"))) if item.name == default else name,
        join((name_mix(item), element("small", item.kind))),
        _name_outcome(found),
        *figures,
        format_bytes(item.bytes),
        format_bytes(item.private_bytes),
    ]


def _name_outcome(found: FidelityEntry | None) -> str:
    """Names the outcome as a label, or in plain words.

    Words are for variants in which the gate had nothing to check.
    """
    if found is None:
        return "not measured"
    return found.outcome if found.outcome == "measured" else render_chip(found.outcome, solid=found.outcome == "passed")


def _draw_bytes(described: BundleDescription) -> Html:
    """Draws a bundle's bytes: in shared files, in each variant's own, and in the rest."""
    own = {item.name: item.private_bytes for item in described.variants}
    rest = described.bytes - described.shared_bytes - sum(own.values())
    sizes = [
        ("shared by variants", described.shared_bytes),
        *((f"{name} alone", size) for name, size in own.items()),
        ("other files", rest),
    ]
    largest = max(size for _, size in sizes)
    power = max(place for place in range(len(_UNITS)) if largest >= 1024**place or place == 0)
    return draw_bars(
        f"{format_bytes(described.bytes)} in all",
        "Each file counts once. Alone: files that only this variant loads. Other files: the rest, such as the tokenizer, the "
        "router, draft tables, and factors of adapters for mixes at request time.",
        _UNITS[power],
        [Bar(name, size / 1024**power, format_bytes(size), "share") for name, size in sizes],
        {"share": "bytes of files"},
    )
