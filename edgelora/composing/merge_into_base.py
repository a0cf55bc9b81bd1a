"""Adds a mix to its base and saves a plain Hugging Face checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora.adapters.checks import check_same_base, check_shapes
from edgelora.adapters.folder import open_adapters
from edgelora.mix.methods import DEFAULT_DENSITY
from edgelora.mix.mix import Mix
from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.weights.checkpoint import DTYPES, write_checkpoint
from edgelora_export.weights.merged import check_delta
from edgelora_export.weights.publish import staged_folder, write_file
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from edgelora.mix.weights import Weight

MERGED = "edgelora_merge.json"  # records what was merged; also marks the folder as one that a later run may replace


@dataclass(frozen=True)
class MergeReport:
    """The checkpoint that was written.

    modules: how many modules' weights changed.
    """

    output: Path
    base_sha256: str
    modules: int


def merge_into(
    base: str,
    adapters: Mapping[str, tuple[Path | str, Weight]],
    output: Path,
    *,
    method: str = "linear",
    density: float = DEFAULT_DENSITY,
    seed: int = 0,
    dtype: str | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> MergeReport:
    """Adds a mix of adapters to a base and saves the sum.

    base: a local folder or a hub id. adapters: name → (folder, weight). dtype: float32, float16 or bfloat16, or None for the
    base's own type.
    Raises InputError for adapters that do not fit the base, and for an output that exists and is not such a checkpoint.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    if not adapters:
        raise InputError("no adapter to merge; give at least one as NAME=FOLDER:WEIGHT")
    found = Base.find(base)
    folders = {name: folder for name, (folder, _) in adapters.items()}
    opened = open_adapters(folders, base=found.config, on_note=on_note)
    decoder = read_decoder(found.config)
    check_same_base(opened, found.sha256)
    mix = Mix(opened, {name: weight for name, (_, weight) in adapters.items()}, method, density, seed)
    check_shapes(opened, decoder)
    check_delta(decoder, mix, "the mix")
    origin = {
        "base": found.name,
        "base_sha256": found.sha256,
        "mix": dict(mix.weights),
        "method": method,
        **mix.options(),
        "adapters": {name: adapter.sha256 for name, adapter in opened.items()},
    }
    with staged_folder(output, marker=MERGED) as folder:
        write_checkpoint(found, decoder, mix, folder, dtype, on_progress)
        write_file(folder / MERGED, [(json.dumps(origin, indent=1) + "\n").encode()])
    return MergeReport(output, found.sha256, len(mix.modules))
