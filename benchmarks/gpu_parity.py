"""The gpu target on a real GPU, against fp16 torch on the merged model.

    python -m benchmarks.gpu_parity --base BASE [--adapter ADAPTER] [--tokens 64] [--prompt TEXT …]

It compares greedy tokens and logits, through CUDA and WebGPU. Every execution provider that finds a GPU runs the bundle twice:
with fp16 weights, which must write torch's tokens, and in int4, which must write the tokens of the same graph on the CPU
provider. Without a GPU the script says so and exits. Checks of the gpu target that need no GPU are in
tests/export/graph/test_gpu_target.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.cli.terminal import print_table
from edgelora.composing.merge_into_base import merge_into
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.plan.variants import Quantization
from edgelora_runtime import Runtime
from edgelora_runtime.errors import UsageError
from edgelora_runtime.session.providers import find_provider

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Answers = list[tuple[list[int], Floats]]  # per prompt, the written tokens and the prompt's logits (T, V)

VARIANT = "tuned"
PROMPTS = ("Question: how does a library lend its books?\nAnswer:", "The city", "Once upon a time there was")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder of the base")
    parser.add_argument("--adapter", type=Path, help="an adapter to merge into it")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to write after each prompt")
    parser.add_argument("--prompt", action="append", help="repeatable; three short prompts if omitted")
    arguments = parser.parse_args()
    base = Base.find(arguments.base)
    providers, reasons = find_gpus(read_decoder(base.config).architecture)
    if not providers:
        sys.exit(f"gpu_parity: no GPU to run on: {'; '.join(reasons)}")
    for reason in reasons:
        print(reason, file=sys.stderr)
    adapters = {} if arguments.adapter is None else {"adapter": arguments.adapter}
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments.base, adapters, arguments.prompt or PROMPTS, arguments.tokens, providers, Path(folder))


def find_gpus(architecture: str) -> tuple[list[str], list[str]]:
    """The available GPU providers, and why the others are unavailable."""
    providers, reasons = [], []
    for name in ("cuda", "webgpu"):
        try:
            find_provider(name, architecture=architecture, gpu_graphs=True)
        except UsageError as error:
            reasons.append(str(error))
        else:
            providers.append(name)
    return providers, reasons


def measure(
    base: str, adapters: dict[str, Path], prompts: Sequence[str], count: int, providers: Sequence[str], folder: Path
) -> None:
    """Exports, runs everything, and prints a row per provider and weight type."""
    mix = dict.fromkeys(adapters, 1.0)
    rows = []
    for bits in (32, 4):
        recipe = Recipe(base, adapters, {VARIANT: VariantRecipe(mix)}, Quantization(bits=bits), targets=("cpu", "gpu"))
        bundle = folder / f"int{bits}"
        export(recipe, bundle, gate="off")
        if bits == 32:
            with Runtime(bundle, provider="cpu") as runtime:
                texts = [runtime.encode(prompt) for prompt in prompts]
            merged = folder / "merged"
            if adapters:
                merge_into(base, {name: (path, 1.0) for name, path in adapters.items()}, merged, dtype="float16")
            device, expected = ask_torch(merged if adapters else Base.find(base).path, texts, count)
            against = f"torch fp16 on {device}"
        else:
            _, expected = ask_runtime(bundle, "cpu", texts, count)
            against = "the same graph on the CPU provider"
        for provider in providers:
            speed, found = ask_runtime(bundle, provider, texts, count)
            same = sum(ours == theirs for (ours, _), (theirs, _) in zip(found, expected, strict=True))
            apart = max(np.abs(ours - theirs).max() for (_, ours), (_, theirs) in zip(found, expected, strict=True))
            weights = "fp16" if bits == 32 else f"int{bits}"
            spread = np.concatenate([logits for _, logits in expected]).std()
            rows.append([provider, weights, against, f"{same} of {len(texts)}", f"{apart:.3g}", f"{spread:.3g}", f"{speed:.1f}"])
    print_table("", ["provider", "weights", "against", "same greedy tokens", "max |Δlogit|", "spread", "tokens/s"], rows)


def ask_runtime(bundle: Path, provider: str, texts: Sequence[list[int]], count: int) -> tuple[float, Answers]:
    """Decode speed in tokens per second, and the gpu target's answers."""
    with Runtime(bundle, provider=provider, target="gpu") as runtime:
        answers, seconds, written = [], 0.0, 0
        for tokens in texts:
            logits = runtime.logits(tokens)
            answer = runtime.generate(tokens, max_tokens=count)
            seconds, written = seconds + answer.decode_ms / 1e3, written + len(answer.tokens) - 1
            answers.append((list(answer.tokens), logits))
    return written / max(seconds, 1e-9), answers


def ask_torch(model_folder: Path, texts: Sequence[list[int]], count: int) -> tuple[str, Answers]:
    """The device, and the answers of transformers in fp16."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    untyped: Any = AutoModelForCausalLM
    model = untyped.from_pretrained(model_folder, dtype=torch.float16).to(device).eval()
    ends = model.generation_config.eos_token_id
    answers = []
    with torch.no_grad():
        for tokens in texts:
            ids = torch.tensor([tokens], device=device)
            logits = model(ids).logits[0].float().cpu().numpy()
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
            written = whole[0, len(tokens) :].tolist()
            stops = {ends} if isinstance(ends, int) else set(ends or ())
            length = next((place for place, token in enumerate(written) if token in stops), len(written))
            answers.append((written[:length], logits))
    return device, answers


if __name__ == "__main__":
    main()
