"""Fidelity of adapters in int4: GPTQ against rounding to nearest, and against onnxruntime-genai's builder.

    make test                                           # sets up .venv
    .venv/bin/python -m benchmarks.fidelity --output fidelity-run      # about an hour on two cores: most of it trains adapters
    .venv/bin/python -m benchmarks.fidelity --output fidelity-run --peer-python PYTHON     # an environment with onnxruntime-genai

Every arm is compared with the unmerged adapter in PEFT in float32, on rows of the .test files, which no training, calibration or
choice used: KL(PEFT ‖ arm) in nats per completion token, and slot F1 of the written completions. Intervals are 95% bootstrap
intervals over rows. Needs the base `pocket` and the data (EDGELORA_MODELS, EDGELORA_DATA, or ../shared/…).
"""

from __future__ import annotations

import argparse
import json
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from benchmarks.pocket import find_base, find_data, train_adapter
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.data.rows import Row, read_rows
from edgelora.data.scores import slot_f1
from edgelora.evaluation import score_variant
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora.in_torch.reference import write_with_torch
from edgelora_export.bundle.fidelity import log_softmax
from edgelora_export.bundle.gate import Gate
from edgelora_export.plan.variants import Quantization
from edgelora_runtime import Runtime
from edgelora_runtime.session.kv_cache import shared_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Logits = Callable[[Sequence[int]], Floats]

TASKS = ("slots-buses", "slots-events", "sql", "medical")
MAX_TOKENS = 48
RESAMPLES = 2000
METHODS = ("rtn", "gptq")
PEER = "onnxruntime-genai"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for adapters and bundles; existing ones are reused")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=150, help="test rows per task for the divergence")
    parser.add_argument("--peer-python", type=Path, help="interpreter of an environment with onnxruntime-genai and torch")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    base, data = find_base(), find_data()
    divergences: dict[str, dict[str, list[Doubles]]] = {}
    scores: dict[str, dict[str, list[float]]] = {}
    for seed in range(arguments.seeds):
        for task, arms in measure(base, data, arguments.output / f"seed-{seed}", seed, arguments.rows, arguments.peer_python):
            for arm, rows in arms["divergence"].items():
                divergences.setdefault(task, {}).setdefault(arm, []).append(rows)
            for arm, score in arms["f1"].items():
                scores.setdefault(task, {}).setdefault(arm, []).append(score)
    report(divergences, scores, as_json=arguments.json)


def measure(base: Path, data: Path, folder: Path, seed: int, count: int, peer: Path | None) -> list[tuple[str, dict[str, Any]]]:
    """Measures each row's divergence per task and arm.

    Also slot F1 by arm, if the completions are slots.
    """
    adapters = {task: train_adapter(base, data / f"{task}.train.jsonl", folder / task, seed) for task in TASKS}
    variants = {task: VariantRecipe({task: 1.0}, merge_base="float") for task in TASKS}  # the teacher's own base
    for method in METHODS:
        print_note(f"exporting with {method}, seed {seed}")
        recipe = Recipe(str(base), adapters, variants, Quantization(method=method), gate=Gate(policy="off"))
        export(recipe, folder / f"bundle-{method}")
    return [(task, measure_task(base, data, folder, task, seed, count, peer)) for task in TASKS]


def measure_task(base: Path, data: Path, folder: Path, task: str, seed: int, count: int, peer: Path | None) -> dict[str, Any]:
    """One task's arms, as in measure()."""
    adapter, rows = folder / task, read_rows(data / f"{task}.test.jsonl")
    teacher, wanted = load_teacher(base, adapter), [row.completion for row in rows]
    slots = slot_f1(wanted, wanted) is not None
    divergence: dict[str, Doubles] = {}
    f1: dict[str, float | None] = {}
    if slots:
        written = write_with_torch(str(base), adapter, rows, quant="none", max_tokens=MAX_TOKENS)
        f1["PEFT, float base"] = slot_f1(written, wanted)
    for method in METHODS:
        print_note(f"{task}, {method}, seed {seed}")
        with Runtime(folder / f"bundle-{method}") as runtime:
            divergence[method] = compare(teacher, partial(runtime.logits, variant=task), runtime, rows[:count])
            if slots:
                f1[method] = score_variant(runtime, rows, variant=task, max_tokens=MAX_TOKENS)
    if peer is not None:
        print_note(f"{task}, {PEER}, seed {seed}")
        with Runtime(folder / f"bundle-{METHODS[0]}") as runtime:
            logits = load_peer(base, adapter, folder / f"peer-{task}", peer)
            divergence[PEER] = compare(teacher, logits, runtime, rows[:count])
    return {"divergence": divergence, "f1": f1}


def compare(teacher: Logits, arm: Logits, runtime: Runtime, rows: Sequence[Row]) -> Doubles:
    """KL(teacher ‖ arm), summed over each row's completion, and its tokens: float64 (rows, 2)."""
    found = np.zeros((len(rows), 2))
    for place, row in enumerate(rows):
        prompt, whole = (runtime.encode(text) for text in (str(row.prompt), f"{row.prompt}{row.completion}"))
        start = max(1, shared_prefix(prompt, whole))
        wanted, said = (log_softmax(logits(whole[:-1])[start - 1 :]) for logits in (teacher, arm))
        found[place] = (np.exp(wanted) * (wanted - said)).sum(), len(whole) - start
    return found


def load_teacher(base: Path, adapter: Path) -> Logits:
    """The unmerged adapter on the float32 base, in PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    model.eval()

    def logits(tokens: Sequence[int]) -> Floats:
        with torch.inference_mode():
            values: Floats = model(torch.tensor([list(tokens)])).logits[0].numpy()
        return values

    return logits


def load_peer(base: Path, adapter: Path, folder: Path, peer: Path) -> Logits:
    """Merges with PEFT, saves a checkpoint, and builds int4 with onnxruntime-genai's builder and its defaults."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint, built = folder / "checkpoint", folder / "built"
    if not built.exists():
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
        model.merge_and_unload().save_pretrained(checkpoint)
        AutoTokenizer.from_pretrained(base).save_pretrained(checkpoint)
        command = [str(peer), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(built)]
        subprocess.run([*command, "-p", "int4", "-e", "cpu", "-c", str(folder / "cache")], check=True, capture_output=True)
    session = ort.InferenceSession(built / "model.onnx", providers=["CPUExecutionProvider"])
    # The builder leaves the cache's last dimension symbolic, so read it from the configuration that it writes.
    head_size = json.loads((built / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    empty = {
        value.name: np.zeros((1, value.shape[1], 0, head_size), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }

    def logits(tokens: Sequence[int]) -> Floats:
        ids = np.array([list(tokens)], np.int64)
        values: Floats = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty})[0][0]
        return values

    return logits


def report(divergences: dict[str, dict[str, list[Doubles]]], scores: dict[str, dict[str, list[float]]], *, as_json: bool) -> None:
    """Prints the tables.

    They are divergence per task and arm, GPTQ's share of each other arm's, and slot F1.
    """
    generator = np.random.default_rng(0)
    arms = list(next(iter(divergences.values())))
    table, ratios = [], []
    for task, by_arm in divergences.items():
        table.append([task, *(" ".join(f"{mean(rows):.5f}" for rows in by_arm[arm]) for arm in arms)])
        ratios.append([task, *(interval(by_arm["gptq"], by_arm[arm], generator) for arm in arms if arm != "gptq")])
    pooled = {arm: [rows for by_arm in divergences.values() for rows in by_arm[arm]] for arm in arms}
    ratios.append(["mean over tasks", *(interval(pooled["gptq"], pooled[arm], generator) for arm in arms if arm != "gptq")])
    f1 = [[task, arm, " ".join(f"{score:.4f}" for score in found)] for task, by in scores.items() for arm, found in by.items()]
    means = {arm: float(np.mean([by[arm] for by in scores.values()])) for arm in next(iter(scores.values()))}
    if as_json:
        print_json({"divergence": table, "ratios": ratios, "f1": f1, "mean_f1": means})
        return
    print_table("mean KL(PEFT ‖ arm), nats per token, by seed", ["task", *arms], table)
    others = [f"gptq / {arm}" for arm in arms if arm != "gptq"]
    print_table("share of the divergence that GPTQ leaves, 95% interval", ["task", *others], ratios)
    print_table("slot F1 on the whole test files, by seed", ["task", "arm", "F1"], f1)
    print_table("slot F1, mean over tasks and seeds", ["arm", "F1"], [[arm, f"{score:.4f}"] for arm, score in means.items()])


def mean(rows: Doubles) -> float:
    """The mean per token, from sums per row."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def interval(ours: Sequence[Doubles], theirs: Sequence[Doubles], generator: np.random.Generator) -> str:
    """Formats the ratio of two mean divergences, averaged over sets of rows.

    It has a bootstrap interval over rows.
    """
    ratio = np.mean([mean(one) for one in ours]) / np.mean([mean(other) for other in theirs])
    drawn = []
    for _ in range(RESAMPLES):
        picks = [generator.integers(0, len(rows), len(rows)) for rows in ours]
        above = np.mean([mean(rows[pick]) for rows, pick in zip(ours, picks, strict=True)])
        drawn.append(above / np.mean([mean(rows[pick]) for rows, pick in zip(theirs, picks, strict=True)]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{ratio:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
