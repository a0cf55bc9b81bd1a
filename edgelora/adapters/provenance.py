"""edgelora.json: the origin of an adapter that edgelora trained or mixed."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from edgelora_export.base.files import read_json
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PROVENANCE = "edgelora.json"
TRAINED_ON = ("nf4", "int4", "none")


@dataclass(frozen=True)
class Provenance:
    """The origin of an adapter.

    base_sha256: hash of the base's weights, as Base.sha256. base_quantization: nf4, int4 or none during training, or "mixed" for
    a mix of adapters that differ in it. data_sha256: hash of the training file. data_file: its path relative to the adapter's
    folder, or "" if unknown. init: how A and B were initialized, or "composed: …" or "learned: …" for a mix.
    rows_cut, rows_left_out: of data_rows, those that were cut to the maximum length, and those with nothing to learn within it.
    template_options: what the chat template got in training beside the messages. loss_on: by what the tokens with loss were told,
    and in how many rows: "completion" of texts, "generation marks" of the chat template, or "prefixes" of the conversation.
    merge_aware: True if training computed with the merged weights on the int4 grid, whose codes export keeps.
    """

    base_name: str
    base_sha256: str
    base_quantization: str
    data_sha256: str
    data_rows: int
    init: str
    seed: int
    rank: int
    alpha: float
    steps: int
    learning_rate: float
    data_file: str = ""
    rows_cut: int = 0
    rows_left_out: int = 0
    template_options: Mapping[str, Any] = field(default_factory=dict)
    loss_on: Mapping[str, int] = field(default_factory=dict)
    merge_aware: bool = False


def pack_provenance(provenance: Provenance) -> str:
    """Packs the content of edgelora.json."""
    return json.dumps(asdict(provenance), indent=1) + "\n"


def write_provenance(folder: Path, provenance: Provenance) -> None:
    """Writes edgelora.json into an adapter's folder."""
    (folder / PROVENANCE).write_text(pack_provenance(provenance), encoding="utf-8")


def read_provenance(folder: Path) -> Provenance | None:
    """Reads edgelora.json. Returns None for an adapter of another tool, which has none."""
    if not (folder / PROVENANCE).is_file():
        return None
    return parse_provenance(read_json(folder / PROVENANCE, "train writes it"), str(folder / PROVENANCE))


def parse_provenance(value: Mapping[str, Any], where: str) -> Provenance:
    """Makes a Provenance from parsed JSON, as read_provenance() does. Raises InputError if a field is absent."""
    known = fields(Provenance)
    required = [each.name for each in known if each.default is MISSING and each.default_factory is MISSING]
    if absent := [name for name in required if name not in value]:
        raise InputError(f"{where} lacks {', '.join(absent)}; train the adapter again or delete the file")
    return Provenance(**{each.name: value[each.name] for each in known if each.name in value})
