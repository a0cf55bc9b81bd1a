"""Perplexity of a real model's bundles, beside llama.cpp on the very file that they were made from.

    python -m benchmarks.real_perplexity --gguf SmolLM2-135M-Instruct.Q4_1.gguf --llama-perplexity bin/llama-perplexity

Exports the GGUF to float32, to int4 by rounding and to int4 by GPTQ, each by the command line, and rates a slice of stories and
the prompts of sql with all of them. Both sides read the same windows of tokens, and rate the second half of each, as
llama-perplexity does. GPTQ sees the general text that comes with edgelora, and neither of these texts.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.llama_cpp import measure_perplexity
from benchmarks.pocket import find_data
from edgelora.cli.terminal import print_json, print_note, print_table
from edgelora.evaluation import log_likelihood
from edgelora.machine import count_cores, describe_machine
from edgelora_runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WINDOW = 512
STORIES_CHARACTERS, SQL_ROWS = 30_000, 400
ARMS: Mapping[str, str] = {
    "float32": 'method = "none"',
    "int4 rounded": 'method = "rtn"',
    "int4 GPTQ": 'method = "gptq"',
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--llama-perplexity", type=Path, help="the binary; without it only ours are measured")
    parser.add_argument("--output", type=Path, help="folder for the bundles; temporary if omitted")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(arguments.gguf, arguments.llama_perplexity, arguments.output or Path(folder))
    if arguments.json:
        print_json({"machine": describe_machine(), "perplexity": results})
        return
    texts = list(next(iter(results.values())))
    rows = [[arm, *(f"{found[text]:.3f}" for text in texts)] for arm, found in results.items()]
    print_table(f"perplexity of {arguments.gguf.name}", ["arm", *texts], rows)


def measure(gguf: Path, binary: Path | None, output: Path) -> dict[str, dict[str, float]]:
    """Perplexity per arm and text."""
    output.mkdir(parents=True, exist_ok=True)
    texts = write_texts(find_data(), output)
    results: dict[str, dict[str, float]] = {}
    for arm, quantization in ARMS.items():
        bundle = export_base(gguf, output, arm, quantization)
        with Runtime(bundle) as runtime:
            results[arm] = {name: rate(runtime, path.read_text(encoding="utf-8")) for name, path in texts.items()}
    if binary is not None:
        threads = count_cores()
        results["llama.cpp"] = {name: measure_perplexity(binary, gguf, path, WINDOW, threads) for name, path in texts.items()}
    return results


def write_texts(data: Path, output: Path) -> dict[str, Path]:
    """Writes the two texts to files, which llama-perplexity reads."""
    rows = [json.loads(line) for line in (data / "sql.test.jsonl").read_text(encoding="utf-8").splitlines()[:SQL_ROWS]]
    contents = {
        "stories": (data / "stories.txt").read_text(encoding="utf-8")[:STORIES_CHARACTERS],
        "sql": "\n".join(row["prompt"] + row["completion"] for row in rows),
    }
    for name, content in contents.items():
        (output / f"{name}.txt").write_text(content, encoding="utf-8")
    return {name: output / f"{name}.txt" for name in contents}


def export_base(gguf: Path, output: Path, arm: str, quantization: str) -> Path:
    """Exports the bare base by the command line, unless it lies there."""
    bundle, recipe = output / arm.replace(" ", "-"), output / "recipe.toml"
    if (bundle / "bundle.json").is_file():
        return bundle
    recipe.write_text(
        f"base = {json.dumps(str(gguf))}\ncontext_length = 2048\n[quantization]\n{quantization}\n[variants.base]\nmix = {{}}\n",
        encoding="utf-8",
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "edgelora", "export", str(recipe), "--output", str(bundle)], check=True)
    print_note(f"{arm}: exported in {time.perf_counter() - started:.0f} s")
    return bundle


def rate(runtime: Runtime, text: str) -> float:
    """The perplexity of the second half of each window, as llama-perplexity measures it."""
    tokens = runtime.encode(text)
    first = _find_bos(runtime, tokens)
    nats, count = 0.0, 0
    for start in range(0, len(tokens) - WINDOW + 1, WINDOW):
        window = list(tokens[start : start + WINDOW])
        if first is not None:
            window[0] = first
        logits = runtime.logits(window)[WINDOW // 2 : -1]
        nats -= float(log_likelihood(np.asarray(logits), window[WINDOW // 2 + 1 :]).sum())
        count += len(logits)
    return math.exp(nats / count)


def _find_bos(runtime: Runtime, tokens: Sequence[int]) -> int | None:
    """The token that the tokenizer starts each text with, if it does."""
    empty = runtime.encode("")
    return empty[0] if empty and empty[0] == tokens[0] else None


if __name__ == "__main__":
    main()
