"""Calibration data to quantize and judge variants on: training rows and general text."""

from __future__ import annotations

import hashlib
import json
import math
import random
from importlib.resources import files as package_files
from typing import TYPE_CHECKING, Any

from edgelora.data.rows import Row, read_rows
from edgelora.data.sources import find_data, list_files
from edgelora_export.plan.calibration import Calibration, Sample
from edgelora_runtime.errors import InputError
from edgelora_runtime.session.kv_cache import shared_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from edgelora.adapters.folder import Adapter

    Encode = Callable[[Any], list[int]]  # of a text, or of a Chat where rows hold conversations

MAX_SAMPLE_TOKENS = 512  # longer samples are cut
MIN_FIT_TOKENS = 16384  # to quantize on, if the data have that many; wide models take twice their widest input
HELD_OUT_TOKENS = 2048  # to judge variants on
GENERAL_TEXT = "general_text.jsonl"  # ships with edgelora, so that GPTQ never sees only a task's format
GENERAL_SHARE = 0.1  # its maximum share of the tokens to quantize on, beside adapters' data; docs/log.md has the figures
_HELD_OUT_SHARE = 8  # one row in this many is held out, up to HELD_OUT_TOKENS; the same with only general text


def find_training_data(adapter: Adapter) -> Path | None:
    """Finds the file that an adapter was trained on.

    Returns None if edgelora.json does not name it, or if it is gone or has changed.
    """
    provenance = adapter.provenance
    if provenance is None or not provenance.data_file:
        return None
    path = adapter.folder / provenance.data_file
    if not path.exists() or hash_data(path) != provenance.data_sha256:
        return None
    return path


def hash_data(path: Path) -> str:
    """SHA-256 of a data file's bytes, or of the names and hashes of the files that training reads in a folder."""
    found = find_data(path)
    if not found.is_dir():
        return _hash_file(found)
    files = (f"{file.relative_to(found).as_posix()} {_hash_file(file)}\n" for file in list_files(found))
    return hashlib.sha256("".join(files).encode()).hexdigest()


def gather_calibration(
    files: Sequence[Path], encode: Encode, *, widest: int, general_share: float = 0.0, seed: int = 0
) -> Calibration:
    """Draws interleaved samples from shuffled data files, and holds a part of each out.

    files: JSON lines of rows or of {"text": …}. encode: of a conversation gives all of it if the assistant has answered.
    widest: inputs of the model's widest product. Second moments from fewer than twice as many tokens mislead GPTQ.
    general_share: the maximum share of edgelora's own general text among the tokens to quantize on, 1 for nothing else. Variants
    are never judged on that text.
    """
    budget = max(MIN_FIT_TOKENS, 2 * widest)
    shuffled = [_shuffle(path, seed) for path in dict.fromkeys(files)]
    fit: list[Sample] = []
    held_out: list[Sample] = []
    fit_tokens = held_out_tokens = 0
    for place in range(max(map(len, shuffled), default=0)):
        for items in shuffled:
            if place >= len(items) or (sample := _encode(items[place], encode)) is None:
                continue
            if place % _HELD_OUT_SHARE == 0 and held_out_tokens < HELD_OUT_TOKENS:
                held_out.append(sample)
                held_out_tokens += len(sample.tokens)
            elif fit_tokens < budget:
                fit.append(sample)
                fit_tokens += len(sample.tokens)
        if fit_tokens >= budget and held_out_tokens >= HELD_OUT_TOKENS:
            break
    sources = {_label(path, files): hash_data(path) for path in dict.fromkeys(files)}
    spare: list[Sample] = []
    if general_share > 0:
        general, sources[f"edgelora/{GENERAL_TEXT}"] = _read_general(encode, seed)
        if not held_out:
            count = len(general) // _HELD_OUT_SHARE
            spare, general = general[:count], general[count:]
        room = fit_tokens * general_share / (1 - general_share) if general_share < 1 else math.inf
        for sample in general:
            if len(sample.tokens) <= room:
                fit.append(sample)
                room -= len(sample.tokens)
    return Calibration(tuple(fit), tuple(held_out), sources, tuple(spare))


def gather_samples(path: Path, encode: Encode, tokens: int, seed: int = 0) -> list[Sample]:
    """Draws samples of one shuffled data file until they add up to `tokens` tokens."""
    found: list[Sample] = []
    for item in _shuffle(path, seed):
        if tokens <= 0:
            break
        if (sample := _encode(item, encode)) is not None:
            found.append(sample)
            tokens -= len(sample.tokens)
    if not found:
        raise InputError(f"data file {path}: no row has two or more tokens")
    return found


def read_general_text() -> list[str]:
    """The general texts that ship with edgelora."""
    return [str(json.loads(line)["text"]) for line in _general_file().splitlines()]


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _general_file() -> bytes:
    return package_files("edgelora.data").joinpath(GENERAL_TEXT).read_bytes()


def _read_general(encode: Encode, seed: int) -> tuple[list[Sample], str]:
    """Reads shuffled samples of the general text, and the SHA-256 of its file."""
    texts = read_general_text()
    random.Random(seed).shuffle(texts)  # noqa: S311  (not for secrets)
    samples = [sample for text in texts if (sample := _encode(text, encode)) is not None]
    return samples, hashlib.sha256(_general_file()).hexdigest()


def _label(path: Path, files: Sequence[Path]) -> str:
    """Returns a file's name, after its folder's if two files share it."""
    names = [other.name for other in dict.fromkeys(files)]
    label = path.name if names.count(path.name) == 1 else f"{path.resolve().parent.name}/{path.name}"
    return "".join(filter(str.isprintable, label))


def _shuffle(path: Path, seed: int) -> list[Row]:
    """Reads a file's rows, shuffled by their number and the seed."""
    items = read_rows(path)
    random.Random(f"{seed} {len(items)}").shuffle(items)  # noqa: S311  (not for secrets)
    return items


def _encode(item: Row | str, encode: Encode) -> Sample | None:
    """Encodes a row or text. Returns None if no token is left to predict."""
    if isinstance(item, str) or item.prompt == "":
        tokens = encode(item if isinstance(item, str) else item.completion)[:MAX_SAMPLE_TOKENS]
        return Sample(tuple(tokens)) if len(tokens) > 1 else None
    whole = encode(item.whole)
    start = max(1, shared_prefix(encode(item.prompt), whole))
    tokens = whole[:MAX_SAMPLE_TOKENS]
    return Sample(tuple(tokens), start) if start < len(tokens) else None
