"""Measures switching, prefill, decode and memory of a bundle's variants on this machine."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_runtime.bundle.choice import choose_variant
from edgelora_runtime.errors import UsageError, suggest_name
from edgelora_runtime.residency.memory import find_anonymous_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgelora_runtime import Runtime

_SEED = 0


@dataclass(frozen=True)
class VariantFigures:
    """A variant's medians over the rounds.

    cold_ms: time to switch to the variant when it is not loaded, with its files in the system's page cache. warm_ms: the same
    when it is loaded. prefill, decode: tokens per second. again_ms: time to the first token of a prompt whose keys and values
    are cached, after other variants have run.
    """

    cold_ms: float
    warm_ms: float
    prefill: float
    decode: float
    again_ms: float


@dataclass(frozen=True)
class BenchReport:
    """The result of a run. prompt, tokens: lengths in tokens.

    Memory is in bytes, with all variants loaded. kernels: Runtime.kernels. mapped: weights on disk, each blob counted once.
    shared: the part of these that several variants map. private: everything else they take, mainly onnxruntime's packed copies.
    resident: the process's memory that no file backs, or None if the system does not tell.
    """

    variants: dict[str, VariantFigures]
    provider: str
    kernels: str
    prompt: int
    tokens: int
    rounds: int
    mapped: int
    shared: int
    private: int
    resident: int | None


def bench(
    runtime: Runtime,
    variants: Sequence[str],
    *,
    prompt: int = 128,
    tokens: int = 64,
    rounds: int = 5,
    on_progress: Callable[[int, int, str], None] = lambda *_: None,
) -> BenchReport:
    """Measures variants, interleaved within each round, on prompts of random tokens.

    Raises UsageError for a variant that the bundle lacks, and for lengths that do not fit the context.
    """
    model = runtime.bundle.manifest.model
    for name, value in (("prompt", prompt), ("tokens", tokens), ("rounds", rounds)):
        if value < 1:
            raise UsageError(f"{name} = {value}: use 1 or more")
    if prompt + tokens > model.context_length:
        raise UsageError(
            f"{prompt} tokens of prompt and {tokens} more do not fit the context of {model.context_length}; ask for less"
        )
    if unknown := [name for name in variants if name not in runtime.variants]:
        near = suggest_name(unknown, runtime.variants)
        raise UsageError(f"no variant {unknown[0]!r} in this bundle; it has {', '.join(runtime.variants)}{near}")
    generator = random.Random(_SEED)  # noqa: S311  (not for secrets)
    manifest = runtime.bundle.manifest
    graphs = [choose_variant(manifest, "cpu", variant).graph for variant in variants]
    vocab_size = min(manifest.find_model(graph).vocab_size for graph in graphs)
    texts = [[generator.randrange(vocab_size) for _ in range(prompt)] for _ in range(rounds)]
    found: dict[str, list[VariantFigures]] = {variant: [] for variant in variants}
    for number, text in enumerate(texts):
        on_progress(number, rounds, "round")
        runtime.close()
        cold = {variant: runtime.switch(variant).milliseconds for variant in variants}
        speeds = {}
        for variant in variants:
            written = runtime.generate(text, variant=variant, max_tokens=tokens + 1, ignore_eos=True)
            speeds[variant] = 1e3 * prompt / written.prefill_ms, 1e3 * tokens / written.decode_ms
        for variant in variants:
            warm = runtime.switch(variant).milliseconds
            again = runtime.generate(text, variant=variant, max_tokens=1, ignore_eos=True)
            found[variant].append(VariantFigures(cold[variant], warm, *speeds[variant], again.prefill_ms))
    on_progress(rounds, rounds, "round")
    usage = runtime.memory
    return BenchReport(
        variants={variant: _take_medians(figures) for variant, figures in found.items()},
        provider=runtime.provider,
        kernels=runtime.kernels,
        prompt=prompt,
        tokens=tokens,
        rounds=rounds,
        mapped=usage.mapped,
        shared=usage.shared,
        private=usage.private,
        resident=find_anonymous_memory(),
    )


def _take_medians(rounds: Sequence[VariantFigures]) -> VariantFigures:
    return VariantFigures(*(statistics.median(values) for values in zip(*(vars(each).values() for each in rounds), strict=True)))
