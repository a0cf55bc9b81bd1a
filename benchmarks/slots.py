"""Slot filling with an NF4 adapter after merging into int4, running live, and mixing.

    make test                                     # sets up .venv
    .venv/bin/python -m benchmarks.slots          # about 10 minutes on two cores
    .venv/bin/python -m benchmarks.slots --json --seed 1 --output slots-run

Needs the base `pocket` and the slot-filling rows (EDGELORA_MODELS, EDGELORA_DATA, or ../shared/models and ../shared/data).
Adapters are trained only on the .train files. F1 is on the whole .test files.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.pocket import find_base, find_data, train_adapter
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.data.rows import Row, read_rows
from edgelora.data.scores import main_score
from edgelora.evaluation import score_variant
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora.formatting import format_share
from edgelora.in_torch.reference import write_with_torch
from edgelora_export.plan.variants import Quantization
from edgelora_runtime import Runtime

DOMAINS = ("slots-buses", "slots-events")
STEPS, MAX_TOKENS = 300, 48
ARMS = ("torch, NF4 base", "merged int4", "live int4", "merged float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for adapters and bundles; temporary if omitted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(find_base(), find_data(), arguments.output or Path(folder), arguments.seed)
    if arguments.json:
        print_json(results)
        return
    rows = [
        [variant, arm, *(format_share(f1[domain]) for domain in DOMAINS)]
        for variant, arms in results.items()
        for arm, f1 in arms.items()
    ]
    print_table("slot F1 (%) on the test files", ["variant", "arm", *DOMAINS], rows)


def measure(base: Path, data: Path, output: Path, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """F1 per variant, arm and domain."""
    adapters = {
        domain: train_adapter(base, data / f"{domain}.train.jsonl", output / domain, seed, steps=STEPS) for domain in DOMAINS
    }
    tests = {domain: read_rows(data / f"{domain}.test.jsonl") for domain in DOMAINS}
    mixes = {"base": {}, **{domain: {domain: 1.0} for domain in DOMAINS}, "mix 0.6 + 0.6": dict.fromkeys(DOMAINS, 0.6)}
    results: dict[str, dict[str, dict[str, float]]] = {variant: {} for variant in mixes}
    for variant, adapter in {"base": None, **adapters}.items():
        print_note(f"evaluating {variant} in torch")
        results[variant][ARMS[0]] = {
            domain: main_score(
                write_with_torch(str(base), adapter, rows, max_tokens=MAX_TOKENS), [row.completion for row in rows]
            )
            for domain, rows in tests.items()
        }
    names = {variant: f"v{index}" for index, variant in enumerate(mixes)}
    for bits, merged_arm in ((4, ARMS[1]), (32, ARMS[3])):
        variants = {names[variant]: VariantRecipe(mix) for variant, mix in mixes.items()}
        live = {variant: mix for variant, mix in mixes.items() if mix and bits == 4}
        variants |= {f"{names[variant]}-live": VariantRecipe(mix, kind="live") for variant, mix in live.items()}
        bundle = output / f"bundle-{bits}"
        export(Recipe(str(base), adapters, variants, Quantization(bits, method="rtn"), merge_base="float"), bundle, gate="off")
        with Runtime(bundle) as runtime:
            for variant, name in names.items():
                print_note(f"evaluating {variant} with {bits} bits in onnxruntime")
                results[variant][merged_arm] = _score_domains(runtime, tests, name)
                if f"{name}-live" in variants:
                    results[variant][ARMS[2]] = _score_domains(runtime, tests, f"{name}-live")
    return results


def _score_domains(runtime: Runtime, tests: dict[str, list[Row]], variant: str) -> dict[str, float]:
    return {domain: score_variant(runtime, rows, variant=variant, max_tokens=MAX_TOKENS) for domain, rows in tests.items()}


if __name__ == "__main__":
    main()
