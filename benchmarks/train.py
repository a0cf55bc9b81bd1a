"""Training four adapters with edgelora, beside plain TRL and PEFT with the same settings: tokens per second and peak memory.

    make test                                     # sets up .venv
    .venv/bin/python -m benchmarks.train          # about 10 minutes on two cores
    .venv/bin/python -m benchmarks.train --steps 40 --repeats 3 --json

Needs the base `pocket` and the slot-filling rows (EDGELORA_MODELS, EDGELORA_DATA, or ../shared/models and ../shared/data).
Each run is a process of its own, and the three ways take turns. All hold the base in NF4 and compute in fp32. TRL casts the
adapters of a quantized base to bf16, which is slow on a CPU, so it is also measured with adapters in fp32, as edgelora trains
them. Tokens per second of wall time say little on a busy machine, so those per second of CPU time stand beside them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from benchmarks.pocket import LEARNING_RATE, SLOTS, find_base, find_data
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.formatting import format_bytes

WAYS = ("edgelora", "TRL", "TRL, fp32 adapters")
RANK, ALPHA, BATCH, LENGTH = 16, 32, 16, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help="train one adapter in this process, and print its figures")
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    if arguments.way:
        print_json(train_once(arguments.way, arguments.data, arguments.steps))
        return
    results = measure(arguments.steps, arguments.repeats)
    if arguments.json:
        print_json(results)
        return
    rows = [
        [
            way,
            *(f"{median(run[name] for run in runs):.0f}" for name in ("tokens_per_second", "tokens_per_cpu_second")),
            f"{compare(results, way, 'tokens_per_second'):.2f}",
            f"{compare(results, way, 'tokens_per_cpu_second'):.2f}",
            format_bytes(max(run["peak_bytes"] for run in runs)),
            f"{median(run['loss'] for run in runs):.3f}",
        ]
        for way, runs in results.items()
    ]
    columns = ["", "tokens/s", "tokens/CPU s", "edgelora is ×", "by CPU time ×", "peak memory", "last loss"]
    print_table(f"four adapters of pocket in NF4, {arguments.steps} steps of {BATCH} rows", columns, rows)


def compare(results: dict[str, list[dict[str, float]]], way: str, name: str) -> float:
    """The geometric mean of edgelora's figure over another way's, pair by pair."""
    return geometric_mean([ours[name] / other[name] for ours, other in zip(results["edgelora"], results[way], strict=True)])


def measure(steps: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """The figures of each run, by way, in the same order of adapters."""
    results: dict[str, list[dict[str, float]]] = defaultdict(list)
    for repeat in range(repeats):
        for place, name in enumerate(SLOTS):
            turn = (repeat + place) % len(WAYS)
            for way in (*WAYS[turn:], *WAYS[:turn]):
                print_note(f"{name}: {way}")
                data = find_data() / f"{name}.train.jsonl"
                command = [sys.executable, "-m", "benchmarks.train", "--way", way, "--data", str(data), "--steps", str(steps)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results[way].append(json.loads(done.stdout))
    return {way: results[way] for way in WAYS}


def train_once(way: str, data: Path, steps: int) -> dict[str, float]:
    """Trains one adapter. The time is that of the steps alone, and the peak that of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        run = train_ours if way == "edgelora" else train_plainly
        figures = run(data, steps, Path(folder), way)
    return {**figures, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


class Clock:
    """Wall and CPU seconds between the first step's end and the last's."""

    def __init__(self) -> None:
        self.started: tuple[float, float] | None = None
        self.seconds = self.cpu_seconds = 0.0

    def tick(self) -> None:
        now = time.perf_counter(), time.process_time()
        self.started = self.started or now
        self.seconds, self.cpu_seconds = (each - first for each, first in zip(now, self.started, strict=True))


def describe(clock: Clock, history: list[dict[str, Any]]) -> dict[str, float]:
    """A run's figures from its clock and what the trainer logged, without the first step."""
    logged = [entry for entry in history if "loss" in entry]
    tokens = logged[-1]["num_tokens"] - logged[0]["num_tokens"]
    return {
        "tokens_per_second": tokens / clock.seconds,
        "tokens_per_cpu_second": tokens / clock.cpu_seconds,
        "loss": logged[-1]["loss"],
    }


def train_ours(data: Path, steps: int, folder: Path, way: str) -> dict[str, float]:
    from edgelora import TrainConfig, train

    clock = Clock()
    config = TrainConfig(
        str(find_base()), data, folder / way, rank=RANK, alpha=ALPHA, lr=LEARNING_RATE, max_steps=steps, batch_size=BATCH
    )
    train(config, on_progress=lambda done, total, what: clock.tick())
    lines = (folder / way / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return describe(clock, [json.loads(line) for line in lines])


def train_plainly(data: Path, steps: int, folder: Path, way: str) -> dict[str, float]:
    """TRL as its documentation shows it, with the same settings."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    clock = Clock()

    class Ticking(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
            if "loss" in logs:
                clock.tick()

    quantization: Any = BitsAndBytesConfig
    nf4 = quantization(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    auto: Any = AutoModelForCausalLM
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    trainer: Any = SFTTrainer(
        model=auto.from_pretrained(find_base(), dtype=torch.float32, quantization_config=nf4, device_map={"": "cpu"}),
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            warmup_steps=0.05,
            max_length=LENGTH,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            seed=0,
            data_seed=0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(find_base()),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear"),
        callbacks=[Ticking()],
    )
    if way.endswith("fp32 adapters"):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    sys.stdout = sys.stderr  # TRL prints its logs
    trainer.train()
    sys.stdout = sys.__stdout__
    return describe(clock, trainer.state.log_history)


if __name__ == "__main__":
    main()
