"""Compares a bundle's variant with the peers that are installed on this machine."""

from __future__ import annotations

import json
import random
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelora.machine import count_cores
from edgelora.peers.comparison import compare
from edgelora.peers.models import OURS, PeerModel, explain_absence, find_installed, find_models, read_once
from edgelora.peers.worker import UnavailableError, Worker
from edgelora_runtime.bundle.choice import choose_variant
from edgelora_runtime.bundle.folder import take_bundle
from edgelora_runtime.errors import UsageError
from edgelora_runtime.session.kernels import choose_kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from edgelora.peers.comparison import Comparison
    from edgelora_runtime import Bundle

_SEED = 0
_STEP = 256  # positions by which llama.cpp's cache grows


@dataclass(frozen=True)
class PeersReport:
    """The result of a comparison. models: by engine, the path of what it ran, and what that is to the variant."""

    variant: str
    models: dict[str, tuple[Path, str]]
    comparison: Comparison


def bench_peers(
    folder: Path,
    *,
    variant: str | None = None,
    models: Sequence[Path] = (),
    python: str = sys.executable,
    prompt: int = 128,
    tokens: int = 64,
    rounds: int = 5,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int, str], None] = lambda *_: None,
) -> PeersReport:
    """Compares one variant with every peer that is installed and has a model, on prompts of random tokens, on the CPU.

    variant: the bundle's default one if None. models: of peers, as find_models() takes them. python: an interpreter with the
    peers' packages. prompt, tokens: lengths in tokens. threads: of every engine, None for the physical cores. options: kernels,
    packed_cache and whole_graphs, as Runtime takes them. Raises UsageError if no peer can be compared with.
    """
    bundle = take_bundle(folder, "quick")
    manifest, options = bundle.manifest, dict(options or {})
    variant = manifest.default_variant if variant is None else variant
    choose_variant(manifest, "cpu", variant)  # refuses other names
    threads = count_cores() if threads is None else threads
    for name, value in (("prompt", prompt), ("tokens", tokens), ("rounds", rounds), ("threads", threads)):
        if value < 1:
            raise UsageError(f"{name} = {value}: use 1 or more")
    context = manifest.model.context_length
    if prompt + tokens + 1 > context:
        raise UsageError(f"{prompt} tokens of prompt and {tokens} + 1 more do not fit the context of {context}; ask for less")
    choose_kernels(options.get("kernels", "auto"), manifest.quantization, provider="cpu", target="cpu")
    found, missing = find_models(bundle, variant, models)
    installed = find_installed(python)
    missing = {name: reason if name in installed else explain_absence(name) for name, reason in missing.items()}
    missing |= {name: explain_absence(model.engine) for name, model in found.items() if model.engine not in installed}
    found = {name: model for name, model in found.items() if name not in missing}
    length = min(-(-(prompt + tokens + 1) // _STEP) * _STEP, context)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}

        def start(name: str, model: PeerModel, interpreter: str) -> None:
            read_once(model.files)
            worker = Worker(model.engine, model.path, python=interpreter, threads=threads, length=length, options=model.options)
            workers[name] = stack.enter_context(worker)

        for name, model in found.items():
            try:
                start(name, model, python)
            except UnavailableError as reason:
                missing[name] = reason.reason
        if not workers:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
            raise UsageError(f"no peer to compare with: {reasons}")
        start(OURS, _describe_ours(bundle, variant, options), sys.executable)
        ordered = {OURS: workers.pop(OURS), **workers}
        vocabulary = min(worker.vocab_size for worker in ordered.values())
        comparison = compare(
            ordered,
            draw_prompts(rounds + 1, prompt, vocabulary),
            tokens,
            threads,
            weight_bytes=_count_read_bytes(bundle, variant),
            missing=missing,
            on_progress=on_progress,
        )
    ran = {name: (model.path, model.note) for name, model in found.items() if name in comparison.engines}
    return PeersReport(variant, {OURS: (bundle.folder, f"the variant {variant}"), **ran}, comparison)


def draw_prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Draws prompts of random tokens, no two with the same first token, so that no cache of prompts helps."""
    if count > vocab_size:
        raise UsageError(f"rounds = {count - 1}: use less than the {vocab_size} tokens of the vocabulary")
    generator = random.Random(_SEED)  # noqa: S311  (not for secrets)
    firsts = generator.sample(range(vocab_size), count)
    return [[first, *(generator.randrange(vocab_size) for _ in range(length - 1))] for first in firsts]


def _describe_ours(bundle: Bundle, variant: str, options: Mapping[str, Any]) -> PeerModel:
    graph = bundle.manifest.variants[variant].graphs["cpu"]
    files = tuple(bundle.folder / name for name in sorted(graph.files))
    return PeerModel(OURS, bundle.folder, files, {"variant": variant, **options})


def _count_read_bytes(bundle: Bundle, variant: str) -> int | None:
    """Counts the bytes of weights that a decode step reads.

    None for a live variant, whose factors come on top, and if the embedding is not known to be the head as well.
    """
    manifest, name = bundle.manifest, "config.json"
    entry = manifest.variants[variant]
    try:
        config = json.loads(bundle.read(name)) if bundle.has(name) else None
    except ValueError:
        config = None
    tied = isinstance(config, dict) and config.get("tie_word_embeddings") is True
    return sum(manifest.blob_bytes(entry.graphs["cpu"]).values()) if tied and entry.kind == "merged" else None
