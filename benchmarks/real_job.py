"""One real job on a real model: two adapters, trained through its chat template, merged, live and mixed, beside llama.cpp.

    python -m benchmarks.real_job --gguf SmolLM2-135M-Instruct.Q4_1.gguf --llama-server bin/llama-server --output job

Every step is the command that a user would type: `train` on rows of messages, `compose` of a mix and of GGUF adapters, `export`
of one bundle. Then each arm answers the same test rows: PEFT on the float weights, the merged int4 variants, the live ones, and
llama-server on the original file with the adapters that `compose` wrote. Ours and llama.cpp's answers are interleaved row by row.
Finished steps are kept in --output, and a second run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.llama_cpp import serve_llama
from benchmarks.pocket import find_data
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.data.rows import Row, read_rows
from edgelora.data.scores import main_score
from edgelora.formatting import format_share
from edgelora.machine import count_cores, describe_machine
from edgelora_runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Message = Mapping[str, str]
    Answer = Callable[[Sequence[Message]], tuple[str, float]]

TASKS = {"sql": "sql", "buses": "slots-buses"}
BATCH_SIZE, MAX_TOKENS, CONTEXT = 4, 48, 1024
RECIPE = """base = {base}
context_length = {context}
[adapters]
sql = {sql}
buses = {buses}
both = {both}
[quantization]
method = "gptq"
[variants.base]
mix = {{}}
[variants.sql]
mix = {{ sql = 1.0 }}
[variants.buses]
mix = {{ buses = 1.0 }}
[variants.both]
mix = {{ both = 1.0 }}
[variants.sql-live]
mix = {{ sql = 1.0 }}
kind = "live"
[variants.buses-live]
mix = {{ buses = 1.0 }}
kind = "live"
[variants.both-live]
mix = {{ both = 1.0 }}
kind = "live"
"""


@dataclass
class Arm:
    """The answers of one arm. rates: decoded tokens per second of each answer."""

    written: dict[str, list[str]] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--llama-server", type=Path, help="the binary; without it llama.cpp is left out")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=100, help="test rows per task")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tests = {task: read_rows(find_data() / f"{name}.test.jsonl")[: arguments.rows] for task, name in TASKS.items()}
    train_and_export(arguments.gguf, arguments.output, arguments.steps)
    arms = answer_all(arguments.gguf, arguments.llama_server, arguments.output, tests)
    arms |= answer_with_peft(arguments.gguf, arguments.output, tests)
    results = {
        name: {
            **{task: main_score(written, [row.completion for row in tests[task]]) for task, written in arm.written.items()},
            "tokens_per_second": statistics.median(arm.rates) if arm.rates else None,
        }
        for name, arm in arms.items()
    }
    if arguments.json:
        print_json({"machine": describe_machine(), "arms": results})
        return
    rows = [[name, *(format_share(found.get(task)) for task in TASKS), _format_rate(found)] for name, found in results.items()]
    print_table("task scores (%) and decoded tokens per second", ["arm", *TASKS, "tokens/s"], rows)


def train_and_export(gguf: Path, output: Path, steps: int) -> None:
    """Trains both adapters, composes their mix and the GGUF files, and exports the bundle, each unless it lies there."""
    for task, name in TASKS.items():
        data = output / f"{task}.train.jsonl"
        if not data.exists():
            rows = read_rows(find_data() / f"{name}.train.jsonl")[: steps * BATCH_SIZE]
            data.write_text("".join(json.dumps(_make_chat(row)) + "\n" for row in rows), encoding="utf-8")
        if not (output / task).exists():
            run(
                "train",
                "--base",
                gguf,
                "--data",
                data,
                "--output",
                output / task,
                "--max-steps",
                steps,
                "--batch-size",
                BATCH_SIZE,
            )
    if not (output / "both").exists():
        both = [part for task in TASKS for part in ("--adapter", f"{task}={output / task}:1.0")]
        run("compose", *both, "--method", "core_tsv", "--output", output / "both")
    for name in (*TASKS, "both"):
        if not (output / f"{name}.gguf").exists():
            run("compose", "--adapter", f"{name}={output / name}:1.0", "--base", gguf, "--output", output / f"{name}.gguf")
    if not (output / "bundle").exists():
        names = {name: json.dumps(str(output / name)) for name in (*TASKS, "both")}
        (output / "recipe.toml").write_text(RECIPE.format(base=json.dumps(str(gguf)), context=CONTEXT, **names), encoding="utf-8")
        run("export", output / "recipe.toml", "--output", output / "bundle")


def run(*words: object) -> None:
    """Runs one edgelora command, and says how long it took."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "edgelora", *map(str, words)], check=True)
    print_note(f"{words[0]}: {time.perf_counter() - started:.0f} s")


def answer_all(gguf: Path, binary: Path | None, output: Path, tests: Mapping[str, Sequence[Row]]) -> dict[str, Arm]:
    """Answers the test rows with our variants and with llama.cpp, one arm after the other for each row."""
    adapters = {name: output / f"{name}.gguf" for name in (*TASKS, "both")}
    with Runtime(output / "bundle") as runtime:
        ours: dict[str, Answer] = {f"ours {name}": _ask_ours(runtime, name) for name in runtime.variants}
        if binary is None:
            return _interleave(ours, tests)
        with serve_llama(binary, gguf, adapters, count_cores(), CONTEXT) as server:
            mixes: dict[str, dict[str, float]] = {"base": {}, **{name: {name: 1.0} for name in adapters}}
            theirs: dict[str, Answer] = {
                f"llama.cpp {name}": lambda messages, mix=mix: server.chat(messages, mix, MAX_TOKENS)  # type: ignore[misc]
                for name, mix in mixes.items()
            }
            return _interleave({**ours, **theirs}, tests)


def answer_with_peft(gguf: Path, output: Path, tests: Mapping[str, Sequence[Row]]) -> dict[str, Arm]:
    """Answers the test rows in torch: the base's float weights, and each adapter in PEFT, unmerged."""
    import torch
    from peft import PeftModel

    from edgelora.in_torch.train import load_base
    from edgelora_export.base.base import Base

    model, tokenizer = load_base(Base.open(gguf), "none")
    peft: Any = PeftModel.from_pretrained(model, str(output / "sql"), adapter_name="sql").eval()
    for name in ("buses", "both"):
        peft.load_adapter(str(output / name), adapter_name=name)
    ends = [tokenizer.eos_token_id]

    def ask(messages: Sequence[Message]) -> tuple[str, float]:
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            found = peft.generate(**ids, max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
        return tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True), 0.0

    arms = {}
    for name in ("base", *TASKS, "both"):
        print_note(f"PEFT: {name}")
        if name == "base":
            with peft.disable_adapter():
                arms[f"PEFT {name}"] = _interleave({name: ask}, tests)[name]
        else:
            peft.set_adapter(name)
            arms[f"PEFT {name}"] = _interleave({name: ask}, tests)[name]
    return arms


def _interleave(arms: Mapping[str, Answer], tests: Mapping[str, Sequence[Row]]) -> dict[str, Arm]:
    """Asks each arm each row, in turns. An arm for one task answers that task's rows alone, `base` and `both` answer all."""
    found = {name: Arm() for name in arms}
    for task, rows in tests.items():
        asked = {name: ask for name, ask in arms.items() if not _is_of_other_task(name, task)}
        for done, row in enumerate(rows):
            for name, ask in asked.items():
                text, rate = ask(_make_chat(row)["messages"][:1])
                found[name].written.setdefault(task, []).append(text)
                if rate:
                    found[name].rates.append(rate)
            if done % 20 == 0:
                print_note(f"{task}: {done} of {len(rows)} rows")
    return found


def _is_of_other_task(name: str, task: str) -> bool:
    subject = name.split()[-1].removesuffix("-live")
    return subject in TASKS and subject != task


def _ask_ours(runtime: Runtime, variant: str) -> Answer:
    def ask(messages: Sequence[Message]) -> tuple[str, float]:
        answer = runtime.generate(messages, variant=variant, max_tokens=MAX_TOKENS)
        return answer.text, (len(answer.tokens) - 1) / max(answer.decode_ms, 1e-9) * 1e3

    return ask


def _make_chat(row: Row) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": str(row.prompt)},
            {"role": "assistant", "content": str(row.completion).strip()},
        ]
    }


def _format_rate(found: Mapping[str, Any]) -> str:
    rate = found["tokens_per_second"]
    return "" if not rate else f"{rate:.0f}"


if __name__ == "__main__":
    main()
