"""Speculative decoding: speed-up on real tasks, agreement of the answers, and cost of steps.

    python -m benchmarks.speculation --output run              # trains adapters and exports them, if run has none yet
    python -m benchmarks.speculation --bundle BUNDLE --steps   # only costs: steps with 0 to 8 draft tokens, for any bundle

Needs the base `pocket`, the rows and the stories of benchmarks/pocket.py. Prompts are those of the .test files, and beginnings of
stories on the bare base, which has no draft table. None of them is cached. For each prompt the modes run in random order with
pauses, as onnxruntime's threads keep spinning after a step and slow other runtimes down. Decode time is an answer's time minus
that of reading its prompt without draft tokens, because the step that reads the prompt also reads draft tokens. Each prompt
counts with its median over rounds. A speed-up is the sum of these without speculation over the sum with it. Its 95% interval
comes from resampling prompts. Answers are greedy.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from benchmarks.pocket import find_base, find_data, train_adapter
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.data.rows import read_rows
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora_export.plan.variants import Quantization
from edgelora_runtime import Bundle, Runtime
from edgelora_runtime.decode.drafter import Drafter
from edgelora_runtime.session.kernels import choose_kernels
from edgelora_runtime.session.model import Model
from edgelora_runtime.session.providers import CPU
from edgelora_runtime.session.step_costs import MAX_DRAFT_TOKENS, MIN_ROWS

if TYPE_CHECKING:
    from collections.abc import Iterator

TASKS = ("slots-buses", "slots-homes", "sql")
STORIES = "base"
MODES = ("on", "auto")
STEPS, MAX_TOKENS = 150, 64
PAUSE = 0.005  # seconds, several times as long as threads keep spinning
STORY, CONTEXT = 120, 64  # characters of a story's beginning; tokens before the measured steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for adapters and the bundle; temporary if omitted")
    parser.add_argument("--bundle", type=Path, help="with --steps: the bundle whose default variant is measured")
    parser.add_argument("--steps", action="store_true", help="measure steps alone")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--identical", type=int, default=125, help="prompts per task whose answers are compared")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = arguments.bundle or make_bundle(arguments.output or Path(folder))
        results: dict[str, Any] = {"steps": measure_steps(Bundle.open(bundle), arguments.rounds, arguments.threads)}
        if not arguments.steps:
            prompts = find_prompts(max(arguments.prompts, arguments.identical))
            results["tasks"] = {
                task: {
                    **compare_speed(bundle, task, each[: arguments.prompts], arguments.rounds, arguments.threads),
                    **compare_answers(bundle, task, each[: arguments.identical], arguments.threads),
                }
                for task, each in prompts.items()
            }
    if arguments.json:
        print_json(results)
        return
    rows = [[str(n), f"{each['cost']:.2f}", f"{each['pays_from']:.2f}"] for n, each in enumerate(results["steps"], 1)]
    print_table("steps, in steps of one row", ["draft tokens", "cost", "break-even share of accepted draft tokens"], rows)
    if "tasks" in results:
        keys = list(next(iter(results["tasks"].values())))
        rows = [[task, *(str(each[key]) for key in keys)] for task, each in results["tasks"].items()]
        print_table("decode speed relative to no speculation, and answers", ["task", *keys], rows)


def make_bundle(output: Path) -> Path:
    """Exports an int4 bundle of the real base.

    It has an adapter and its draft table per task.
    """
    bundle = output / "bundle"
    if not bundle.exists():
        adapters = {
            task: train_adapter(find_base(), find_data() / f"{task}.train.jsonl", output / task, 0, steps=STEPS) for task in TASKS
        }
        variants = {STORIES: VariantRecipe({}), **{task: VariantRecipe({task: 1.0}) for task in TASKS}}
        recipe = Recipe(str(find_base()), adapters, variants, Quantization(method="rtn"), merge_base="float", draft_tables=True)
        export(recipe, bundle, gate="off")
    return bundle


def find_prompts(count: int) -> dict[str, list[str]]:
    """Prompts by variant."""
    text = (find_data() / "stories.txt").read_text(encoding="utf-8")
    starts = range(len(text) * 9 // 10, len(text) - STORY, len(text) // 10 // count)
    tests = {task: [str(row.prompt) for row in read_rows(find_data() / f"{task}.test.jsonl")][:count] for task in TASKS}
    return {**tests, STORIES: [text[start : start + STORY] for start in starts][:count]}


def compare_speed(bundle: Path, variant: str, prompts: list[str], rounds: int, threads: int | None) -> dict[str, Any]:
    """Measures speed ratios by mode, after an uncounted round.

    Each mode has its own runtime, so each adapts separately.
    """
    modes = ("off", *MODES)
    runtimes = [Runtime(bundle, cache_budget=0, threads=threads, provider="cpu") for _ in modes]
    reading, writing = np.empty((2, rounds + 1, len(modes), len(prompts)))  # milliseconds
    random = np.random.default_rng(0)
    tokens = drafted = accepted = 0
    for turn in range(rounds + 1):
        print_note(f"{variant}, round {turn} of {rounds}")
        for place, prompt in enumerate(prompts):
            for at in random.permutation(len(modes)):
                time.sleep(PAUSE)
                found = runtimes[at].generate(prompt, variant=variant, max_tokens=MAX_TOKENS, speculation=modes[at])
                reading[turn, at, place], writing[turn, at, place] = found.prefill_ms, found.decode_ms
                if modes[at] == "on":
                    tokens, drafted = tokens + len(found.tokens), drafted + found.drafted_tokens
                    accepted += found.accepted_tokens
    decoding = np.median((reading + writing)[1:], axis=0) - np.median(reading[1:, 0], axis=0)
    drawn = random.integers(0, len(prompts), (1000, len(prompts)))
    ratios = {}
    for mode, each in zip(MODES, decoding[1:], strict=True):
        low, high = np.percentile(decoding[0][drawn].sum(axis=1) / each[drawn].sum(axis=1), [2.5, 97.5])
        ratios[mode] = f"{decoding[0].sum() / each.sum():.2f} ({low:.2f}–{high:.2f})"
    return {**ratios, "accepted draft tokens": round(accepted / max(drafted, 1), 2), "of all tokens": round(accepted / tokens, 2)}


def compare_answers(bundle: Path, variant: str, prompts: list[str], threads: int | None) -> dict[str, str]:
    """Counts the answers that draft tokens leave unchanged.

    It compares with the same kernels without draft tokens, and with no speculation.
    """

    def answer(mode: str) -> Iterator[tuple[int, ...]]:
        with Runtime(bundle, threads=threads, provider="cpu") as runtime:
            for prompt in prompts:
                yield runtime.generate(prompt, variant=variant, max_tokens=MAX_TOKENS, speculation=mode).tokens

    with patch.object(Drafter, "propose", lambda drafter, limit, min_rate=0.0: []):
        undrafted = list(answer("on"))
    drafted_answers, plain = list(answer("on")), list(answer("off"))
    same = sum(one == other for one, other in zip(drafted_answers, undrafted, strict=True))
    alike = sum(one == other for one, other in zip(drafted_answers, plain, strict=True))
    return {"same without draft tokens": f"{same} of {len(prompts)}", "same as off": f"{alike} of {len(prompts)}"}


def measure_steps(bundle: Bundle, rounds: int, threads: int | None) -> list[dict[str, float]]:
    """Measures the cost of steps with 1 to 8 draft tokens.

    It is in one-row steps, the median over rounds, with the break-even acceptance rate.
    """
    manifest = bundle.manifest
    graph = manifest.variants[manifest.default_variant].graphs["cpu"].file
    kernels = choose_kernels("auto", manifest.quantization, provider="cpu", target="cpu")
    model = Model.open(bundle.path(graph), manifest.model, threads=threads, provider=CPU, kernels=kernels)
    tokens = np.random.default_rng(0).integers(0, manifest.model.vocab_size, CONTEXT + MAX_DRAFT_TOKENS + 1).tolist()
    cache = model.new_cache()
    model.reserve(cache, len(tokens))
    model.read(cache, tokens[:CONTEXT])
    costs: list[list[float]] = []
    for _ in range(rounds + 1):
        seconds = []
        for rows in range(1, MAX_DRAFT_TOKENS + 2):
            cache.rewind(CONTEXT)
            started = time.perf_counter()
            model.read(cache, tokens[CONTEXT : CONTEXT + rows], keep=rows)
            seconds.append(time.perf_counter() - started)
        costs.append([each / seconds[0] for each in seconds])
    medians = np.median(costs[1:], axis=0)[MIN_ROWS - 1 :].tolist()
    return [{"cost": cost, "pays_from": find_break_even(cost, draft_tokens)} for draft_tokens, cost in enumerate(medians, 1)]


def find_break_even(cost: float, draft_tokens: int) -> float:
    """Finds the acceptance rate at which a step's cost equals its tokens.

    It is the p at which 1 + p + p² + … + p^draft_tokens tokens equal a step's cost. Above 1 if no rate does.
    """
    shares = np.arange(0, 1001) / 1000
    worth = np.sum([shares**power for power in range(draft_tokens + 1)], axis=0) >= cost
    return float(shares[worth.argmax()]) if worth.any() else float("inf")


if __name__ == "__main__":
    main()
