"""The command line: one function per verb, each importing what it needs only when it is called."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from edgelora.cli import compose as compose_cli
from edgelora.cli.arguments import BaseOption, JsonOption, SeedOption, is_given, parse_mix, parse_pairs, read_option_file
from edgelora.terminal import format_bytes, format_share, print_json, print_note, print_table, show_progress
from edgelora_runtime import __version__
from edgelora_runtime.bundle.router import AUTO
from edgelora_runtime.errors import EdgeloraError, IntegrityError, UsageError

if TYPE_CHECKING:
    from edgelora_runtime import Runtime

# Typer carries a copy of click, or needs click, depending on its version; its one public error leads to both.
_USAGE_ERROR: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="edgelora",
    help="Mix LoRA adapters on one 4-bit base, compile the mixes into int4 ONNX variants, switch between them offline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")]
VariantOption = Annotated[
    str | None, typer.Option(help="The variant, or auto: the bundle's router picks one per prompt. The default without it.")
]
MixOption = Annotated[
    list[str] | None,
    typer.Option("--mix", metavar="ADAPTER=WEIGHT", help="Mix live adapters for this call; repeat for each."),
]
ThreadsOption = Annotated[int | None, typer.Option(help="Compute threads; all physical cores without it.")]
ProviderOption = Annotated[
    str, typer.Option(help="cpu, cuda, webgpu, or auto: a GPU where there is one and the bundle has graphs for it.")
]
PackedCacheOption = Annotated[
    bool, typer.Option("--packed-cache", help="Map packed weights from this machine's cache; what is not there yet is written.")
]
WholeGraphsOption = Annotated[
    bool, typer.Option("--whole-graphs", help="One session per variant that shares nothing, for steps that may be faster.")
]
KernelsOption = Annotated[
    str, typer.Option(help="Whose kernels compute: edgelora (the package edgelora-kernels), onnxruntime, or auto.")
]
MaxTokensOption = Annotated[int, typer.Option(help="Tokens to write at the most.")]


def main() -> NoReturn:
    """Runs the command line; every failure is one line on standard error and an exit code."""
    as_json = "--json" in sys.argv
    try:
        app(standalone_mode=False)
        code = 0
    except typer.Exit as exit_:
        code = exit_.exit_code
    except _USAGE_ERROR as error:
        code = _report(error.format_message(), 2, as_json)
    except EdgeloraError as error:
        code = _report(str(error), error.exit_code, as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except ModuleNotFoundError as error:
        if os.environ.get("EDGELORA_DEBUG"):
            raise
        code = _report(f"{error.name} is not installed; run: pip install 'edgelora[train]'", 2, as_json)
    except OSError as error:
        if os.environ.get("EDGELORA_DEBUG"):
            raise
        code = _report(f"{error.filename or 'a file'}: {error.strerror or error}; check the path and its permissions", 3, as_json)
    except MemoryError:
        code = _report("out of memory; close other programs, or use a smaller model or context", 5, as_json)
    except Exception as error:
        if os.environ.get("EDGELORA_DEBUG"):
            raise
        code = _report(
            f"internal error: {type(error).__name__}: {error} (EDGELORA_DEBUG=1 shows where; please report it)",
            1,
            as_json,
        )
    sys.exit(code)


def _report(message: str, code: int, as_json: bool) -> int:
    line = " ".join(message.split())
    print_note(f"edgelora: {line}")
    if as_json:
        print_json({"error": line, "exit_code": code})
    return code


def _open_runtime(
    bundle: Path, threads: int | None, provider: str, packed_cache: bool, whole_graphs: bool, kernels: str
) -> Runtime:
    from edgelora_runtime import PackedCache, Runtime

    cache = PackedCache() if packed_cache else None
    return Runtime(bundle, threads=threads, provider=provider, packed_cache=cache, whole_graphs=whole_graphs, kernels=kernels)


def _show_version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def train(
    context: typer.Context,
    base: BaseOption,
    data: Annotated[Path, typer.Option(help='JSON lines of {"prompt": …, "completion": …}.')],
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    quant: Annotated[str, typer.Option(help="How the base is held: nf4, int4 (the grid that export writes) or none.")] = "nf4",
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    alpha: Annotated[float, typer.Option(help="LoRA alpha; the scale is alpha / rank.")] = 32.0,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps; overrides --epochs.")] = None,
    seed: SeedOption = 0,
    composable: Annotated[
        int | None, typer.Option(metavar="SLOT", help="Made to be mixed: freeze A to this slot of a common basis, 0, 1, …")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML with any of TrainConfig's fields; flags that are given win.")] = None,
    json: JsonOption = False,
) -> None:
    """Fine-tune a LoRA adapter on a 4-bit base (QLoRA)."""
    from edgelora.in_torch.train import TrainConfig, read_train_config
    from edgelora.in_torch.train import train as run_training

    flags = {
        "quant": quant,
        "rank": rank,
        "alpha": alpha,
        "epochs": epochs,
        "lr": lr,
        "max_steps": max_steps,
        "seed": seed,
        "composable": composable,
    }
    given = {name: value for name, value in flags.items() if is_given(context, name)}
    settings = {**(read_train_config(config) if config else {}), **given}
    with show_progress("training") as on_progress:
        report = run_training(TrainConfig(**{**settings, "base": base, "data": data, "output": output}), on_progress=on_progress)
    if json:
        print_json(report)
    else:
        print(
            f"{report.output}: {report.steps} steps on {report.rows} rows in {report.seconds:.0f} s, loss {report.train_loss:.3f}"
        )


app.add_typer(compose_cli.app, name="compose")


@app.command()
def export(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="Base, adapters and the mixes that become variants.")],
    output: Annotated[Path, typer.Option(help="Folder for the bundle.")],
    calibration: Annotated[
        Path | None,
        typer.Option(help='JSON lines of {"text": …} or rows to quantize and judge on, beside the adapters\' training data.'),
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(help="For a variant that loses its adapter: repair (the recipe's default), fail, live; or off."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for a picture per variant: what each layer keeps.")] = None,
    json: JsonOption = False,
) -> None:
    """Compile a recipe's mixes into a bundle of ONNX variants, and check what each keeps of its adapters."""
    import edgelora
    from edgelora.inspection import show_bundle
    from edgelora_runtime import Bundle

    with show_progress("exporting") as on_progress:
        edgelora.export(recipe, output, calibration=calibration, gate=gate, on_progress=on_progress, on_note=print_note)
    opened = Bundle.open(output)
    if report is not None:
        from edgelora.report.fidelity_pages import write_fidelity

        for path in write_fidelity(opened, report):
            print_note(f"{path}")
    show_bundle(opened, json)


@app.command()
def inspect(bundle: BundleArgument, json: JsonOption = False) -> None:
    """Show what a bundle holds: variants, mixes, bytes of each and bytes shared, and what each keeps of its adapters."""
    from edgelora.inspection import show_bundle
    from edgelora_runtime import Bundle

    show_bundle(Bundle.open(bundle), json)


@app.command()
def verify(bundle: BundleArgument, json: JsonOption = False) -> None:
    """Check every byte of a bundle against its manifest; exit code 4 names what differs."""
    from edgelora_runtime import Bundle

    opened = Bundle.open(bundle)
    with show_progress("verifying") as on_progress:
        done = 0

        def count(name: str) -> None:
            nonlocal done
            done += 1
            on_progress(done, len(opened.manifest.files), name)

        broken = opened.verify(count)
    if broken:
        raise IntegrityError(f"bundle {bundle}: {', '.join(broken)} differ from the manifest; copy or export the bundle again")
    size = sum(entry.size for entry in opened.manifest.files.values())
    if json:
        print_json({"bundle": bundle, "files": len(opened.manifest.files), "bytes": size, "ok": True})
    else:
        print(f"{bundle}: {len(opened.manifest.files)} files, {format_bytes(size)}, all as listed")


@app.command()
def run(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads standard input.")],
    variant: VariantOption = None,
    mix: MixOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's message through the chat template.")] = False,
    max_tokens: MaxTokensOption = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that together reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens that were seen less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling; a random one without it.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeat for each.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds after which what was written so far is the answer.")] = None,
    overflow: Annotated[
        str, typer.Option(help="Over the context's end: error, or slide, which drops the text's middle.")
    ] = "error",
    logprobs: Annotated[int, typer.Option(help="With --json: log probabilities of so many likeliest tokens; 0 for none.")] = 0,
    json_schema: Annotated[Path | None, typer.Option(metavar="FILE", help="A JSON schema that the answer is to fit.")] = None,
    regex: Annotated[str | None, typer.Option(help="A regular expression that the whole answer is to match.")] = None,
    grammar: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A grammar in Lark's notation that the answer is to fit.")
    ] = None,
    speculation: Annotated[str, typer.Option(help="Guess tokens ahead: on, auto (where it pays), or off.")] = "off",
    threads: ThreadsOption = None,
    provider: ProviderOption = "auto",
    packed_cache: PackedCacheOption = False,
    whole_graphs: WholeGraphsOption = False,
    kernels: KernelsOption = "auto",
    json: JsonOption = False,
) -> None:
    """Continue a prompt with one variant."""
    from edgelora.cli.chat import describe_route

    text = sys.stdin.read() if prompt == "-" else prompt
    with _open_runtime(bundle, threads, provider, packed_cache, whole_graphs, kernels) as runtime:
        stream = runtime.stream(
            [{"role": "user", "content": text}] if chat else text,
            variant=variant,
            mix=parse_mix(mix),
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop or (),
            timeout=timeout,
            overflow=overflow,
            logprobs=logprobs,
            json_schema=read_option_file(json_schema, "--json-schema"),
            regex=regex,
            grammar=read_option_file(grammar, "--grammar"),
            speculation=speculation,
        )
        for piece in stream:
            if not json:
                print(piece, end="", flush=True)
        assert stream.generation is not None
        if json:
            print_json(stream.generation)
            return
        print()
        if stream.generation.route is not None:
            print_note(describe_route(stream.generation.route))


@app.command()
def chat(
    bundle: BundleArgument,
    variant: VariantOption = None,
    max_tokens: MaxTokensOption = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.")] = None,
    threads: ThreadsOption = None,
    provider: ProviderOption = "auto",
    packed_cache: PackedCacheOption = False,
    whole_graphs: WholeGraphsOption = False,
    kernels: KernelsOption = "auto",
    json: JsonOption = False,
) -> None:
    """Talk to a bundle; /switch NAME changes the variant between two turns."""
    from edgelora.cli.chat import run_chat

    with _open_runtime(bundle, threads, provider, packed_cache, whole_graphs, kernels) as runtime:
        turns = run_chat(runtime, variant=variant, max_tokens=max_tokens, temperature=temperature, seed=seed, quiet=json)
    if json:
        print_json({"turns": turns})


@app.command("eval")
def evaluate(
    bundle: BundleArgument,
    data: Annotated[Path, typer.Option(help='JSON lines of {"prompt": …, "completion": …}.')],
    variant: VariantOption = None,
    mix: MixOption = None,
    limit: Annotated[int | None, typer.Option(help="Score only the first rows.")] = None,
    max_tokens: MaxTokensOption = 64,
    threads: ThreadsOption = None,
    provider: ProviderOption = "auto",
    packed_cache: PackedCacheOption = False,
    whole_graphs: WholeGraphsOption = False,
    kernels: KernelsOption = "auto",
    json: JsonOption = False,
) -> None:
    """Score a variant on a data file: exact match, loss, and slot F1 where the completions are slots."""
    from edgelora.data.rows import read_rows
    from edgelora.evaluation import evaluate as run_evaluation

    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: use 1 or more")
    rows = read_rows(data)[:limit]
    with (
        _open_runtime(bundle, threads, provider, packed_cache, whole_graphs, kernels) as runtime,
        show_progress("evaluating") as on_progress,
    ):
        name, weights = variant, parse_mix(mix)
        if variant != AUTO:
            name = runtime.switch(variant, mix=weights).variant
        scores = run_evaluation(runtime, rows, variant=variant, mix=weights, max_tokens=max_tokens, on_progress=on_progress)
    if json:
        print_json({"bundle": bundle, "variant": name, "data": data, **vars(scores)})
        return
    columns = ["variant", "rows", "exact match %", "slot F1 %", "loss / token", "perplexity"]
    row = [str(name), str(scores.rows), format_share(scores.exact_match), format_share(scores.slot_f1)]
    print_table("", columns, [[*row, f"{scores.loss:.3f}", f"{scores.perplexity:.2f}"]])
    if scores.routed:
        print("routed to " + ", ".join(f"{variant} {count}" for variant, count in sorted(scores.routed.items())))


@app.command()
def bench(
    bundle: BundleArgument,
    variant: Annotated[list[str] | None, typer.Option(help="A variant to measure; repeat for each. All without it.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds, in each of which every variant has its turn.")] = 5,
    threads: ThreadsOption = None,
    provider: ProviderOption = "auto",
    packed_cache: PackedCacheOption = False,
    whole_graphs: WholeGraphsOption = False,
    kernels: KernelsOption = "auto",
    json: JsonOption = False,
) -> None:
    """Measure switching, prefill, decode and memory of a bundle's variants on this machine."""
    from edgelora.bench import bench as run_bench
    from edgelora.bench import show_bench

    with (
        _open_runtime(bundle, threads, provider, packed_cache, whole_graphs, kernels) as runtime,
        show_progress("measuring") as on_progress,
    ):
        names = list(dict.fromkeys(variant or runtime.variants))
        report = run_bench(runtime, names, prompt=prompt, tokens=tokens, rounds=rounds, on_progress=on_progress)
    show_bench(report, json)


@app.command()
def doctor(json: JsonOption = False) -> None:
    """Say what this machine has of what edgelora can use, and what to install."""
    from edgelora.doctor import diagnose

    found = diagnose()
    if json:
        print_json({"edgelora": __version__, **vars(found)})
        return
    memory = "unknown" if found.memory is None else format_bytes(found.memory)
    print(f"edgelora {__version__}, Python {found.python}, {found.system}, {found.cores} cores, {memory} of memory")
    print(f"onnxruntime providers: {', '.join(found.providers) or 'none'}; edgelora's own kernels: {found.kernels or 'none'}")
    print_table("", ["package", "version"], [[name, version or "absent"] for name, version in found.packages.items()])
    folder, held = found.packed_cache
    print(f"packed cache: {format_bytes(held)} in {folder}, which may be deleted at any time")
    for line in found.advice:
        print(f"- {line}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("edgelora-demo"),
    seed: SeedOption = 1,  # docs/log.md says why not 0
    base: Annotated[str | None, typer.Option(help="Run on this base instead of the built-in one; needs --data.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE.jsonl", help="A task's rows, with --base; repeat for each. Their adapters are mixed."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Train, mix, export and switch on a model made from nothing, or on your own base and data."""
    from edgelora.demo import run_demo
    from edgelora.demo.report import show_report

    report = run_demo(output, seed=seed, base=base, data=parse_pairs(data or [], "--data NAME=FILE.jsonl"))
    if json:
        print_json(report)
    else:
        show_report(report)
