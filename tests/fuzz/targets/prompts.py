"""A file of cached prompts, whose checksum is right more often than not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.numpy import load

from edgelora_runtime import Runtime
from edgelora_runtime.residency.prompt_file import hash_prompts
from tests.fuzz.harness import Harness
from tests.fuzz.mutations import mutate_json, mutate_safetensors, mutate_value

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

WORDS = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "dtype",
    "shape",
    "data_offsets",
    "__metadata__",
    "live",
    "tokens",
    "graph",
    "0.0.key",
)


def build(bundle: Path, folder: Path) -> Harness:
    runtime = Runtime(bundle, threads=1, memory_budget="64MiB", cache_budget="16MiB")
    path = folder / "prompts.safetensors"
    mixed = next(name for name, entry in runtime.adapters.items() if entry.file is not None)
    seeds = []
    for options in ({}, {"mix": {mixed: 1.0}}):
        runtime.generate("the cat", max_tokens=2, **options)  # type: ignore[arg-type]
        runtime.save_prompts(path)
        runtime.close()
        seeds.append(path.read_bytes())

    def use(raw: bytes) -> None:
        path.write_bytes(raw)
        runtime.load_prompts(path)
        runtime.close()

    return Harness(seeds, mutate, use, limit=max(map(len, seeds)) + 4096)


def mutate(raw: bytes, chance: Random) -> bytes:
    changed = mutate_safetensors(raw, chance, lambda header: mutate_header(header, chance))
    return correct_checksum(changed) if chance.randrange(8) else changed


def mutate_header(header: bytes, chance: Random) -> bytes:
    """Changes a header, or the JSON inside its metadata."""
    try:
        value = json.loads(header)
        entries = json.loads(value["__metadata__"]["prompts"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return mutate_json(header, chance, WORDS)
    if chance.randrange(2):
        return mutate_json(header, chance, WORDS)
    value["__metadata__"]["prompts"] = json.dumps(mutate_value(entries, chance, WORDS))
    return json.dumps(value).encode()


def correct_checksum(raw: bytes) -> bytes:
    """Writes the right checksum into a file, where safetensors can read it."""
    size = int.from_bytes(raw[:8], "little")
    try:
        header = json.loads(raw[8 : 8 + size])
        said = header["__metadata__"]
        said["sha256"] = hash_prompts(said["prompts"], load(raw))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
        return raw
    packed = json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + raw[8 + size :]
