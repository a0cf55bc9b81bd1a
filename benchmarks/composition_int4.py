"""Exports the mixes of composition.py to int4, merged and live.

    .venv/bin/python -m benchmarks.composition --output composition-run --set "four domains"
    .venv/bin/python -m benchmarks.composition_int4 --output composition-run

It separates the loss of composing from that of quantizing. The figure is slot F1 on the .test files, averaged over the four
domains, for each domain's own adapter and for each mix: in float32 in torch, and exported with GPTQ in onnxruntime, merged and
live. Composition loss: own adapters minus the mix, both in float32. Quantization loss: the mix in float32 minus the exported mix.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.composition import add_arguments
from benchmarks.composition_data import ALL, name_file, prepare
from benchmarks.pocket import SLOTS, find_base, find_data
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.evaluation import score_variant
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora_export.bundle.gate import Gate
from edgelora_runtime import Runtime

if TYPE_CHECKING:
    from benchmarks.composition_data import Prepared

MIXES = ("regmean", "regmean + factors")
KINDS = ("merged", "live")
MAX_TOKENS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    arguments = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(arguments.seeds):
        prepared = prepare(find_base(), find_data(), arguments.output, seed, arguments.rows, SLOTS)
        for mix, scores in measure(prepared).items():
            for arm, score in scores.items():
                found.setdefault(mix, {}).setdefault(arm, []).append(score)
    means = {mix: {arm: float(np.mean(scores)) for arm, scores in arms.items()} for mix, arms in found.items()}
    if arguments.json:
        print_json(means)
        return
    own = means["own adapters"]["float32"]
    rows = []
    for mix, arms in means.items():
        for kind in KINDS:
            lost = [f"{own - arms['float32']:.3f}", f"{arms['float32'] - arms[kind]:.3f}"]
            rows.append([mix, kind, f"{arms['float32']:.3f}", f"{arms[kind]:.3f}", *lost])
    columns = ["mix", "exported", "F1 float32", "F1 int4", "composition loss", "quantization loss"]
    print_table("slot F1, mean of four domains and seeds", columns, rows)


def measure(prepared: Prepared) -> dict[str, dict[str, float]]:
    """Measures mean F1 over the domains by mix: float32, merged, live.

    Results are kept in the seed's folder.
    """
    store = prepared.folder / "scores" / "int4.json"
    if store.exists():
        kept: dict[str, dict[str, float]] = json.loads(store.read_text())
        return kept
    folders = {name: adapter.folder for name, adapter in prepared.plain.items()}
    folders |= {name_file(mix): prepared.mix(prepared.plain, mix) for mix in MIXES}
    names = {key: key.replace("+", "and") for key in folders}  # variant names cannot contain +
    variants = {f"{names[key]}.{kind}": VariantRecipe({names[key]: 1.0}, kind) for key in folders for kind in KINDS}
    bundle = prepared.folder / "bundle-int4"
    if not bundle.exists():
        print_note(f"exporting {len(variants)} variants")
        recipe = Recipe(prepared.base, {names[key]: folder for key, folder in folders.items()}, variants, gate=Gate(policy="off"))
        export(recipe, bundle, calibration=prepared.fit(ALL))  # mixes have no training data
    served = {"own adapters": {task: task for task in SLOTS}}  # task → key of the adapter or mix that serves it
    served |= {mix: dict.fromkeys(SLOTS, name_file(mix)) for mix in MIXES}
    found: dict[str, dict[str, float]] = {mix: {} for mix in served}
    with Runtime(bundle) as runtime:
        for kind in KINDS:
            print_note(f"{prepared.folder.name}: {kind} int4")
            for mix, keys in served.items():
                scores = [
                    score_variant(runtime, prepared.tests[task], variant=f"{names[key]}.{kind}", max_tokens=MAX_TOKENS)
                    for task, key in keys.items()
                ]
                found[mix][kind] = float(np.mean(scores))
    for mix, arm in zip(served, ("own adapter", *MIXES), strict=True):
        path = prepared.scores("four domains") / f"{name_file(arm)}.json"
        counts = {task: np.array(rows) for task, rows in json.loads(path.read_text())["counts"].items()}
        found[mix]["float32"] = float(np.mean([rows[:, 0].sum() / rows[:, 1].sum() for rows in counts.values()]))
    store.write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
