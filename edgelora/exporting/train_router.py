"""Trains the router that edgelora_runtime.bundle.router runs.

It learns from the prompts of the variants' training data.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save

from edgelora.data.calibration import find_training_data, read_general_text
from edgelora.data.rows import read_request, read_rows
from edgelora.exporting.softmax_regression import SparseRows, find_temperature, fit_softmax
from edgelora_export.plan.variants import PackedRouter
from edgelora_runtime.bundle.manifest import RouterClass, RouterEntry
from edgelora_runtime.bundle.router import ROUTER, Router, count_ngrams
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora.adapters.folder import Adapter
    from edgelora.exporting.recipe import Recipe, RouterRecipe
    from edgelora.mix.weights import Weight

# docs/log.md has the figures behind the first two.
BUCKETS = 1 << 14
PENALTY = 5e-5
HELD_OUT_SHARE = 8  # one prompt in this many is held out, by its hash
MAX_NGRAMS = 1 << 19  # default of max_ngrams
MIN_PROMPTS = 8  # per variant
_SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+|\n")


@dataclass(frozen=True)
class _Prompt:
    """A training or test prompt of a class, as its n-grams."""

    label: int
    ngrams: tuple[NDArray[np.int64], NDArray[np.float32]]
    held_out: bool


def make_router(recipe: Recipe, adapters: Mapping[str, Adapter]) -> PackedRouter | None:
    """Trains the router that a recipe asks for, if any.

    Raises InputError for variants without prompts, and for variants that would learn from the same prompts.
    """
    if recipe.router is None:
        return None
    files = assign_data(recipe, recipe.router, adapters)
    prompts = {name: [read_request(row) for path in paths for row in read_rows(path)] for name, paths in files.items()}
    fallback = recipe.router.fallback or recipe.default or next(iter(recipe.variants))
    return train_router(prompts, fallback=fallback, threshold=recipe.router.threshold)


def assign_data(recipe: Recipe, router: RouterRecipe, adapters: Mapping[str, Adapter]) -> dict[str, list[Path]]:
    """The files whose prompts the router learns to send to each variant.

    An adapter's training data go to one variant: the first whose mix is only this adapter, or else the first whose mix has it
    with a weight above 0. Files that the recipe names for a variant replace its adapters' data.
    """
    names = list(dict.fromkeys((*(router.variants or recipe.variants), *router.data)))
    files = {name: list(router.data.get(name, ())) for name in names}
    lost = {}
    for adapter, owner in _find_owners({name: recipe.variants[name].mix for name in names}).items():
        if owner not in router.data:
            path = find_training_data(adapters[adapter])
            if path is None:
                lost[adapter] = owner
            else:
                files[owner].append(path)
    if lost:
        raise InputError(
            f"router: the training data of {', '.join(lost)} are not where edgelora.json says, or have changed; name files "
            f'under [router.data], as {next(iter(lost.values()))} = "FILE.jsonl", or list other variants'
        )
    if router.variants and (idle := [name for name, paths in files.items() if not paths]):
        raise InputError(
            f"router: no prompts are left for {', '.join(idle)}: an adapter's go to the first variant with it alone; "
            "remove it from variants, or name files under [router.data]"
        )
    files = {name: list(dict.fromkeys(paths)) for name, paths in files.items() if paths}
    if not files:
        raise InputError("router: no variant has an adapter with training data; name files under [router.data]")
    owned: dict[Path, str] = {}
    for name, paths in files.items():
        for path in paths:
            if (other := owned.setdefault(path.resolve(), name)) != name:
                raise InputError(f"router: {other} and {name} would both learn from {path}; list only one of them in variants")
    return files


def _find_owners(mixes: Mapping[str, Mapping[str, Weight]]) -> dict[str, str]:
    """The variant that each adapter's prompts go to."""
    added = {name: [adapter for adapter, weight in mix.items() if _is_added(weight)] for name, mix in mixes.items()}
    owners: dict[str, str] = {}
    for alone in (True, False):
        for name, adapters in added.items():
            if (len(adapters) == 1) == alone:
                for adapter in adapters:
                    owners.setdefault(adapter, name)
    return owners


def train_router(
    prompts: Mapping[str, Sequence[str]], *, fallback: str, threshold: float = 0.0, max_ngrams: int = MAX_NGRAMS
) -> PackedRouter:
    """Trains a router that sends each prompt to the variant with similar prompts.

    All other prompts go to the fallback.
    prompts: by variant. threshold: the confidence below which the fallback is used as well. max_ngrams: per class, each n-gram of
    a prompt counted once. Prompts beyond are left out.
    A separate class, for prompts unlike any variant's, is trained on the sentences of edgelora's general text.
    Raises InputError for a variant with too few prompts to learn from.
    """
    classes: list[str | None] = [*prompts, None]
    texts = [*prompts.values(), _sentences()]
    chosen = [prompt for label, each in enumerate(texts) for prompt in _choose_prompts(label, each, max_ngrams)]
    fit = [prompt for prompt in chosen if not prompt.held_out]
    counts = np.bincount([prompt.label for prompt in fit], minlength=len(classes))
    if few := [f"{name} has {count}" for name, count in zip(prompts, counts[:-1], strict=True) if count < MIN_PROMPTS]:
        raise InputError(f"router: {', '.join(few)} prompts to learn from; give at least {2 * MIN_PROMPTS} rows")
    weights, bias = fit_softmax(
        SparseRows.stack([prompt.ngrams for prompt in fit], BUCKETS),
        np.array([prompt.label for prompt in fit]),
        len(classes),
        penalty=PENALTY,
    )
    held_out = [prompt for prompt in chosen if prompt.held_out]
    labels = np.array([prompt.label for prompt in held_out], np.int64)
    rows = SparseRows.stack([prompt.ngrams for prompt in held_out], BUCKETS)
    temperature = find_temperature(rows.times(weights) + bias, labels)
    stored, shift = (weights / temperature).astype(np.float16), (bias / temperature).astype(np.float32)
    right = (rows.times(stored.astype(np.float64)) + shift).argmax(axis=1) == labels
    entries = []
    for label, name in enumerate(classes):
        tested = int((labels == label).sum())
        accuracy = float(right[labels == label].mean()) if tested else None
        entries.append(RouterClass(name, int(counts[label]), tested, accuracy))
    known = [each.accuracy for each in entries if each.accuracy is not None]
    entry = RouterEntry(
        ROUTER, "bytes 3-5", tuple(entries), fallback, threshold, accuracy=float(np.mean(known)) if known else None
    )
    content = save({"weights": stored, "bias": shift})
    Router.read(content, entry)  # checks that the runtime can read it
    return PackedRouter(entry, content)


def _choose_prompts(label: int, texts: Sequence[str], max_ngrams: int) -> list[_Prompt]:
    """Takes a class's texts, in the order of their hashes, up to max_ngrams."""
    chosen: list[_Prompt] = []
    room = max_ngrams
    for digest, text in sorted((hashlib.sha256(text.encode(errors="replace")).digest(), text) for text in texts):
        ngrams = count_ngrams(text, BUCKETS)
        room -= len(ngrams[0])
        if room < 0:
            break
        chosen.append(_Prompt(label, ngrams, digest[-1] % HELD_OUT_SHARE == 0))
    return chosen


def _sentences() -> list[str]:
    """The sentences and lines of edgelora's general text."""
    return [piece for text in read_general_text() for piece in _SENTENCE_END.split(text) if piece.strip()]


def _is_added(weight: Weight) -> bool:
    """True if a mix adds an adapter in some module.

    Leaving it out or subtracting it does not count.
    """
    return max(weight.values(), default=0.0) > 0 if isinstance(weight, Mapping) else weight > 0
