"""`edgelora bench`: measures a bundle's variants on this machine."""

from __future__ import annotations

import sys
from pathlib import Path  # noqa: TC003  (typer reads the annotations)
from typing import TYPE_CHECKING, Annotated

import typer

from edgelora.cli.arguments import BundleArgument, JsonOption  # noqa: TC001  (typer reads the annotations)
from edgelora.cli.completion import complete_variants
from edgelora.cli.runtime_options import RuntimeOptions, takes_runtime_options
from edgelora.cli.terminal import print_json, print_line, print_next, print_table, quote_path, show_progress
from edgelora.formatting import format_bytes
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from edgelora.bench import BenchReport
    from edgelora.peers.bench import PeersReport
    from edgelora.peers.comparison import Comparison

_PEERS = "Peers"  # a heading in --help


@takes_runtime_options
def bench(
    bundle: BundleArgument,
    runtime_options: RuntimeOptions,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A variant to measure; repeat for each. All variants if omitted, the default one with --peers.",
            autocompletion=complete_variants,
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(metavar="N", help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to write.")] = 64,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds; each measures every variant once.")] = 5,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Compare one variant with onnxruntime-genai and llama.cpp, on the CPU, where they are installed.",
            rich_help_panel=_PEERS,
        ),
    ] = False,
    peer_model: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="MODEL",
            help="A peer's model: a .gguf file for llama.cpp, a folder with genai_config.json for onnxruntime-genai; repeat for "
            "each. If omitted, the variant's own graph, and the GGUF file that the bundle was made from, if it lies beside it.",
            rich_help_panel=_PEERS,
        ),
    ] = None,
    peers_python: Annotated[
        str | None,
        typer.Option(
            metavar="PYTHON", help="The Python interpreter that has the peers; this one if omitted.", rich_help_panel=_PEERS
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure switching, prefill, decode and memory of a bundle's variants on this machine."""
    if peers:
        report = _compare(bundle, runtime_options, variant or [], (prompt, tokens, rounds), peer_model or [], peers_python)
        if json:
            print_json({"variant": report.variant, "models": report.models, **vars(report.comparison)})
        else:
            show_peers(report)
        return
    if peer_model or peers_python is not None:
        raise UsageError("--peer-model and --peers-python are for a comparison; add --peers")
    _measure(bundle, runtime_options, variant, (prompt, tokens, rounds), json)


def _compare(
    bundle: Path,
    options: RuntimeOptions,
    variants: list[str],
    sizes: tuple[int, int, int],
    models: list[Path],
    python: str | None,
) -> PeersReport:
    """Compares one variant with the peers. Raises UsageError for several variants, and for a provider other than the CPU."""
    from edgelora.peers.bench import bench_peers

    if len(set(variants)) > 1:
        raise UsageError(f"--peers compares one variant, and {len(set(variants))} are given; give --variant once")
    if options.provider not in ("auto", "cpu"):
        raise UsageError(f"--peers compares on the CPU, not on {options.provider!r}; leave --provider out")
    prompt, tokens, rounds = sizes
    ours = {"kernels": options.kernels, "packed_cache": options.packed_cache, "whole_graphs": options.whole_graphs}
    with show_progress("comparing") as on_progress:
        return bench_peers(
            bundle,
            variant=variants[0] if variants else None,
            models=models,
            python=python or sys.executable,
            prompt=prompt,
            tokens=tokens,
            rounds=rounds,
            threads=options.threads,
            options=ours,
            on_progress=on_progress,
        )


def _measure(
    bundle: Path, runtime_options: RuntimeOptions, variant: list[str] | None, sizes: tuple[int, int, int], json: bool
) -> None:
    """Measures variants by themselves, and prints the result."""
    from edgelora.bench import bench as run_bench

    prompt, tokens, rounds = sizes
    with (
        runtime_options.open(bundle) as runtime,
        show_progress("measuring") as on_progress,
    ):
        names = list(dict.fromkeys(variant or runtime.variants))
        report = run_bench(runtime, names, prompt=prompt, tokens=tokens, rounds=rounds, on_progress=on_progress)
    if json:
        print_json(report)
    else:
        show_bench(report)
        print_next(
            f'edgelora run {quote_path(bundle)} "…" --variant {min(names, key=lambda name: -report.variants[name].decode)}'
        )


def show_bench(report: BenchReport) -> None:
    """Prints a report as a table, and a line about memory."""
    columns = ["variant", "cold switch ms", "warm switch ms", "prefill tok/s", "decode tok/s", "cached prompt ms"]
    rows = [
        [
            name,
            f"{figures.cold_ms:.0f}",
            f"{figures.warm_ms:.2f}",
            f"{figures.prefill:.1f}",
            f"{figures.decode:.1f}",
            f"{figures.again_ms:.1f}",
        ]
        for name, figures in report.variants.items()
    ]
    title = (
        f"prompt {report.prompt}, {report.tokens} tokens, medians of {report.rounds} rounds, {report.provider}, {report.kernels}"
    )
    print_table(title, columns, rows)
    resident = "" if report.resident is None else f"; the process holds {format_bytes(report.resident)} beside its files"
    print_line(
        f"loaded: {format_bytes(report.mapped)} of weights, {format_bytes(report.shared)} of them shared, "
        f"{format_bytes(report.private)} packed{resident}"
    )


def show_peers(report: PeersReport) -> None:
    """Prints a comparison with the peers, and what each engine ran."""
    show_comparison(f"variant {report.variant}", report.comparison)
    for name, (path, note) in report.models.items():
        print_line(f"{name} ran {path}, {note}")


def show_comparison(title: str, found: Comparison) -> None:
    """Prints the speeds of engines as a table, then the machine, the engines' settings, and the engines that are missing."""
    from edgelora.peers.comparison import NOISE

    columns = ["engine", "load s", "prefill tok/s", "decode tok/s", "ours/theirs: prefill", "decode"]
    rows = []
    for name, figures in found.engines.items():
        ratios = [str(ratio) for ratio in found.ratios[name].values()] if name in found.ratios else ["", ""]
        speeds = [f"{figures.prefill.median:.1f}", f"{figures.decode.median:.1f}"]
        rows.append([name, f"{figures.load_seconds:.2f}", *speeds, *ratios])
    sizes = f"prompt {found.prompt}, tokens {found.tokens}, threads {found.threads}"
    print_table(f"{title}, {sizes}, median (least–greatest) of {found.rounds} rounds", columns, rows)
    machine = found.machine
    print_line(f"{machine['cpu']}, {machine['physical_cores']} cores, {machine['system']}, Python {machine['python']}")
    share = "" if found.bandwidth_share is None else f"; our decode reads weights at {found.bandwidth_share:.0%} of that"
    print_line(f"memory is read at {found.bandwidth / 1e9:.1f} GB/s{share}")
    if found.other_work is not None:
        warning = ": do not trust these figures" if found.other_work > NOISE else ""
        print_line(f"other programs took {found.other_work:.0%} of the CPU{warning}")
    for name, figures in found.engines.items():
        print_line(f"{name} {figures.version}: {figures.settings}")
    for name, reason in found.missing.items():
        print_line(f"{name}: {reason}")
