"""Reads the rows of a search, and sets a part aside for the report.

Test splits are refused under any name.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora.data.calibration import find_training_data
from edgelora.data.rows import read_rows
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from edgelora.adapters.folder import Adapter
    from edgelora.data.rows import Row

# Short rows recur by chance: up to 13% of the rows of a training file are also in its test file (slots; docs/log.md).
CHANCE_SHARE = 0.25
_TEST = re.compile(r"tests?(set|split)?\d*")


@dataclass(frozen=True)
class HeldOut:
    """A task's distinct rows.

    searched: rows to choose the weights on. confirmed: rows to measure the result on.
    """

    searched: tuple[Row, ...]
    confirmed: tuple[Row, ...]

    @property
    def sha256(self) -> str:
        """A hash of the exact text of both parts."""
        parts = [[(str(row.prompt), row.completion) for row in rows] for rows in (self.searched, self.confirmed)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_held_out(
    data: Mapping[str, Path], adapters: Mapping[str, Adapter], confirm: float, on_note: Callable[[str], None]
) -> dict[str, HeldOut]:
    """Reads each task's rows and keeps the share `confirm` out of the search.

    The rows to keep out are chosen by a hash of their content.
    Raises InputError for a file that is a test split by its name, and for one that shares more than CHANCE_SHARE of its rows, or
    of the other's rows, with a test file beside it or beside an adapter's training data. Fewer shared rows are left out, with a
    note. A note also says how many rows an adapter was trained on.
    """
    if named := [f"{name}={path}" for name, path in data.items() if is_test_file(path) or is_test_file(path.resolve())]:
        raise InputError(f"{', '.join(named)}: a test split by its name; use rows that no result is reported on")
    tests = _read_tests(data, adapters, on_note)
    rows = {task: {hash_row(row): row for row in read_rows(path)} for task, path in data.items()}
    refused = []
    for task, found in rows.items():
        for path, hashes in tests.items():
            shared = len(found.keys() & hashes)
            if shared > CHANCE_SHARE * min(len(found), len(hashes)):
                refused.append(f"{task}={data[task]}: {shared} of its {len(found)} rows are among the {len(hashes)} of {path}")
            elif shared:
                on_note(f"{task}: {shared} of {len(found)} rows are also in {path}; they are left out")
    if refused:
        raise InputError(f"{'; '.join(refused)}, a test split; use rows that no result is reported on")
    _note_training_rows(rows, adapters, on_note)
    tested = {item for hashes in tests.values() for item in hashes}
    return {task: _split({item: found[item] for item in found.keys() - tested}, confirm, task) for task, found in rows.items()}


def is_test_file(path: Path) -> bool:
    """True if a file is a test split by its name.

    x.test.jsonl, test-2.jsonl and test/x.jsonl are, and latest.jsonl is not.
    """
    return any(_TEST.fullmatch(part) for part in [*re.split(r"[^a-z0-9]+", path.name.lower()), path.parent.name.lower()])


def hash_row(row: Row) -> str:
    """SHA-256 of a row's text, ignoring case, white space and Unicode variants (NFKC)."""
    parts = (" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in (str(row.prompt), row.completion))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read_tests(
    data: Mapping[str, Path], adapters: Mapping[str, Adapter], on_note: Callable[[str], None]
) -> dict[Path, set[str]]:
    """Row hashes of each test file beside the data or beside the adapters' training data."""
    folders = {path.resolve().parent for path in data.values()}
    for adapter in adapters.values():
        if adapter.provenance is not None and adapter.provenance.data_file:
            folders.add((adapter.folder / adapter.provenance.data_file).resolve().parent)
    tests = {}
    for path in sorted(file for folder in folders if folder.is_dir() for file in folder.glob("*.jsonl")):
        if is_test_file(path):
            try:
                tests[path] = {hash_row(row) for row in read_rows(path)}
            except InputError as error:
                on_note(f"{path} is not compared with the data: {error}")
    return tests


def _note_training_rows(
    rows: Mapping[str, Mapping[str, Row]], adapters: Mapping[str, Adapter], on_note: Callable[[str], None]
) -> None:
    for name, adapter in adapters.items():
        path = find_training_data(adapter)
        trained = {hash_row(row) for row in read_rows(path)} if path is not None else set()
        for task, found in rows.items():
            if shared := len(found.keys() & trained):
                on_note(f"{task}: {name} was trained on {shared} of {len(found)} rows, so its figures there are optimistic")


def _split(rows: Mapping[str, Row], confirm: float, task: str) -> HeldOut:
    ordered = [rows[item] for item in sorted(rows)]
    kept = round(confirm * len(ordered))
    if len(ordered) - kept < 1 or (confirm > 0 and kept < 1):
        raise InputError(f"{task} has {len(ordered)} distinct rows: too few to search on and keep some for the report")
    return HeldOut(tuple(ordered[kept:]), tuple(ordered[:kept]))
