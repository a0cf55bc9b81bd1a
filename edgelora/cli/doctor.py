"""`edgelora doctor`: shows what edgelora can use on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora.cli.arguments import JsonOption  # noqa: TC001  (typer reads the annotations)
from edgelora.cli.terminal import print_json, print_line, print_next, print_table
from edgelora.formatting import format_bytes
from edgelora_runtime import __version__

if TYPE_CHECKING:
    from edgelora.doctor import DecodeLimit, Diagnosis


def doctor(json: JsonOption = False) -> None:
    """Show what edgelora can use on this machine, and what to install."""
    from edgelora.doctor import diagnose

    found = diagnose()
    if json:
        print_json({"edgelora": __version__, **vars(found)})
    else:
        show_diagnosis(found)


def show_diagnosis(found: Diagnosis) -> None:
    """Prints versions, kernels, memory's speed, what is ready, packages, the packed cache and the advice, and what to do next."""
    memory = "unknown" if found.memory is None else format_bytes(found.memory)
    print_line(f"edgelora {__version__}, Python {found.python}, {found.system}, {found.cores} cores, {memory} of memory")
    print_line(f"onnxruntime providers: {', '.join(found.providers) or 'none'}")
    print_line(f"CPU: {found.cpu}; kernels of 4-bit bundles: {found.kernels_choice}")
    if found.decode_limit is not None:
        print_line(describe_limit(found.decode_limit))
    for item in found.ready:
        remedy = f"; {item.remedy}" if item.remedy else ""
        print_line(f"{item.name + ':':8}{item.lacks or 'ready'}{remedy}")
    print_table("", ["package", "version"], [[name, version or "absent"] for name, version in found.packages.items()])
    folder, held = found.packed_cache
    print_line(f"packed cache: {format_bytes(held)} in {folder}, which may be deleted at any time")
    for line in found.advice:
        print_line(f"- {line}")
    print_next(found.remedy or "edgelora demo, which trains, mixes, exports and switches adapters on a tiny model")


def describe_limit(limit: DecodeLimit) -> str:
    """Returns what memory lets a model decode, in a sentence."""
    threads = "1 thread" if limit.threads == 1 else f"{limit.threads} threads"
    model = f"a 4-bit model of {limit.weights / 1e9:.0f}B weights ({limit.weight_bytes / 1e9:.2f} GB)"
    speed = f"memory gives {limit.bandwidth / 1e9:.1f} GB/s to {threads}"
    return f"{speed}: {model} decodes at most {limit.tokens_per_second:.0f} tokens/s"
