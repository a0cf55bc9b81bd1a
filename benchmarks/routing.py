"""Routing without a second model: accuracy per task, calibration, and cost of a pick.

    make test                                       # sets up .venv
    .venv/bin/python -m benchmarks.routing          # a minute on two cores
    .venv/bin/python -m benchmarks.routing --adapters FOLDER --json

Needs the task data (EDGELORA_DATA, or ../shared/data). Routers learn from the .train files. Figures are on the .test files.
--adapters: a folder with an adapter per slots domain, named after its data, on the base `pocket` (EDGELORA_MODELS,
or ../shared/models). It adds slot F1 of variant "auto" next to that of each domain's own variant, int4 by rounding to nearest.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.pocket import SLOTS, find_base, find_data
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.data.rows import Row, read_rows
from edgelora.data.scores import parse_slots
from edgelora.evaluation import score_variant
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, RouterRecipe, VariantRecipe
from edgelora.exporting.train_router import train_router
from edgelora.formatting import format_share
from edgelora_export.plan.variants import Quantization
from edgelora_runtime import Runtime
from edgelora_runtime.bundle.router import AUTO, Router

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TASKS = (*SLOTS, "sql", "medical")
OTHERS = "math"  # a task without a variant
LENGTHS = (100, 400, 1600, 6400)  # prompt lengths in bytes, about four per token
BINS = (0.0, 0.5, 0.7, 0.9, 0.99, 1.0)  # bins of confidence
MAX_TOKENS, REPEATS = 48, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--adapters", type=Path, help="folder with an adapter per slots domain, to measure slot F1")
    parser.add_argument("--limit", type=int, help="score only this many rows of each test file")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    data = find_data()
    results: dict[str, Any] = {"routers": {len(tasks): measure(data, tasks) for tasks in (SLOTS, TASKS)}}
    if arguments.adapters is not None:
        results["slot_f1"] = measure_f1(find_base(), data, arguments.adapters, arguments.limit)
    if arguments.json:
        print_json(results)
    else:
        show(results)


def measure(data: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """One router: shares per task, calibration, time and size."""
    started = time.process_time()
    prompts = {task: [str(row.prompt) for row in read_rows(data / f"{task}.train.jsonl")] for task in tasks}
    packed = train_router(prompts, fallback=tasks[0])
    seconds = time.process_time() - started
    router = Router.read(packed.content, packed.entry)
    classes, confidences, right = {}, [], []
    for task in tasks:
        rows = read_rows(data / f"{task}.test.jsonl")
        picked = [router.pick(str(row.prompt)) for row in rows]
        own = np.array([variant == task and not fallback for variant, _, fallback in picked])
        slots = np.array([bool(parse_slots(row.completion)) for row in rows])
        classes[task] = {
            "rows": len(rows),
            "own": float(own.mean()),
            "own_with_slots": float(own[slots].mean()) if task in SLOTS else None,
            "fallback": float(np.mean([fallback for _, _, fallback in picked])),
        }
        confidences += [confidence for _, confidence, _ in picked]
        right += own.tolist()
    others = [router.pick(str(row.prompt)) for row in read_rows(data / f"{OTHERS}.test.jsonl")]
    text = " ".join(str(row.prompt) for row in read_rows(data / f"{tasks[0]}.test.jsonl"))
    return {
        "classes": classes,
        "fallback_of_others": float(np.mean([fallback for _, _, fallback in others])),
        "calibration": calibrate(np.array(confidences), np.array(right)),
        "microseconds": {length: time_pick(router, text[:length]) for length in LENGTHS},
        "bytes": len(packed.content),
        "training_seconds": seconds,
        "held_out_accuracy": packed.entry.accuracy,
    }


def calibrate(confidences: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> list[dict[str, float]]:
    """Calibration: rows, mean confidence and accuracy per bin of confidence."""
    places = np.digitize(confidences, BINS[1:-1])
    return [
        {
            "from": BINS[place],
            "rows": int((places == place).sum()),
            "confidence": float(confidences[places == place].mean()),
            "accuracy": float(right[places == place].mean()),
        }
        for place in range(len(BINS) - 1)
        if (places == place).any()
    ]


def time_pick(router: Router, text: str) -> float:
    """Times a pick in microseconds, as the median of many.

    It is this thread's CPU time, as other programs may be running.
    """
    times = []
    for _ in range(REPEATS):
        started = time.thread_time()
        router.pick(text)
        times.append(time.thread_time() - started)
    return float(np.median(times)) * 1e6


def measure_f1(base: Path, data: Path, folder: Path, limit: int | None) -> dict[str, dict[str, float]]:
    """Measures slot F1 by domain, of its own variant and of the router's pick."""
    recipe = Recipe(
        base=str(base),
        adapters={domain: folder / domain for domain in SLOTS},
        variants={"base": VariantRecipe({}), **{domain: VariantRecipe({domain: 1.0}) for domain in SLOTS}},
        quantization=Quantization(method="rtn"),
        merge_base="float",
        router=RouterRecipe(data={domain: (data / f"{domain}.train.jsonl",) for domain in SLOTS}),
    )
    tests: Mapping[str, list[Row]] = {domain: read_rows(data / f"{domain}.test.jsonl")[:limit] for domain in SLOTS}
    with tempfile.TemporaryDirectory() as temporary:
        print_note("exporting")
        export(recipe, Path(temporary) / "bundle", gate="off")
        found = {}
        with Runtime(Path(temporary) / "bundle") as runtime:
            for domain, rows in tests.items():
                print_note(f"scoring {domain}")
                scores = {arm: score_variant(runtime, rows, variant=arm, max_tokens=MAX_TOKENS) for arm in (domain, AUTO)}
                found[domain] = {"own": scores[domain], "auto": scores[AUTO], "ratio": scores[AUTO] / scores[domain]}
    found["mean"] = {key: float(np.mean([scores[key] for scores in found.values()])) for key in ("own", "auto", "ratio")}
    return found


def show(results: Mapping[str, Any]) -> None:
    """Prints all figures as tables."""
    for count, found in results["routers"].items():
        rows = [
            [task, str(each["rows"]), *(format_share(each[key]) for key in ("own", "own_with_slots", "fallback"))]
            for task, each in found["classes"].items()
        ]
        print_table(f"{count} variants: % of test rows", ["task", "rows", "to its own", "of those with slots", "fallback"], rows)
        print(f"of {OTHERS}, which none of them serves, {format_share(found['fallback_of_others'])}% fall back")
        rows = [
            [f"{each['from']:g}", str(each["rows"]), f"{each['confidence']:.3f}", f"{each['accuracy']:.3f}"]
            for each in found["calibration"]
        ]
        print_table("", ["confidence from", "rows", "mean confidence", "share right"], rows)
        times = ", ".join(f"{length}: {microseconds:.0f}" for length, microseconds in found["microseconds"].items())
        print(f"microseconds by bytes of prompt: {times}; {found['bytes']} bytes; trained in {found['training_seconds']:.0f} s")
    if "slot_f1" in results:
        rows = [
            [name, format_share(each["own"]), format_share(each["auto"]), f"{each['ratio']:.3f}"]
            for name, each in results["slot_f1"].items()
        ]
        print_table("slot F1 (%) on the test files", ["domain", "own variant", "auto", "auto / own"], rows)


if __name__ == "__main__":
    main()
