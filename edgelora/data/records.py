"""Reads files of training data as records: JSON lines, a JSON array, CSV, parquet, Arrow and plain text."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from typing import TYPE_CHECKING, Any

from edgelora.data.shapes import KEYS
from edgelora.data.sources import is_saved, list_files
from edgelora_export.base.quiet import first_line
from edgelora_runtime.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    Records = Iterator[tuple[object, str]]  # a record, and its place: the file and its line or row

_BATCH = 256  # rows of a table at a time
_LONGEST_CELL = 1 << 30  # characters
_LISTS = ("messages", "prompt", "completion", "conversations", "history", "tools")  # that a table may hold as JSON text
_FOREIGN = {  # the first bytes of files that hold rows, but not as text
    b"PK\x03\x04": "a zip archive or a spreadsheet", b"\x28\xb5\x2f\xfd": "compressed with zstd", b"SQLite": "an SQLite database",
    b"BZh": "compressed with bzip2", b"\xfd7zXZ": "compressed with xz",
}  # fmt: skip


def read_records(path: Path, splits: Sequence[str]) -> Records:
    """Reads the records of a file or folder, each with its place for errors.

    splits: of a folder that has some. A place is a file's line of JSON lines, else its row, counted from 1 without a header.
    Raises InputError for files that cannot be read as what they are.
    """
    for file in list_files(path, splits):
        yield from _read_arrow(file) if is_saved(file.parent) else _read_file(file)


def _parse_records(text: str, path: Path | str) -> Records:
    """Parses JSON lines, or one JSON array of records. path: names the file in errors."""
    text = text.removeprefix("\ufeff")
    if text.lstrip().startswith("["):
        value, error = _parse(text)
        if isinstance(value, list):
            return ((item, f"{path} row {number}") for number, item in enumerate(value, 1))
        first = text.lstrip().split("\n", 1)[0]
        if error and _parse(first)[1]:
            raise InputError(f"{path} starts as a JSON array and is none ({error})")
    elif text.lstrip().startswith("{") and _parse(text.strip().split("\n", 1)[0])[1]:
        value, error = _parse(text)  # one object over several lines
        if isinstance(value, dict):
            return iter([(value, f"{path} row 1")])
    return parse_lines(text, path)


def _parse(text: str) -> tuple[Any, Exception | None]:
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:
        return None, error


def parse_lines(text: str, path: Path | str) -> Records:
    """Parses JSON lines, and skips blank ones. Raises InputError for a line that is not JSON."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            value, error = _parse(line)
            if error:
                raise InputError(f"{path} line {number} is not JSON ({error})") from error
            yield value, f"{path} line {number}"


def _read_file(path: Path) -> Records:
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError) as error:
        raise InputError(f"data file {path} cannot be read ({error})") from error
    if raw[:4] == b"PAR1":
        return _read_parquet(raw, path)
    if raw[:6] == b"ARROW1":
        return _read_arrow(path)
    for start, kind in _FOREIGN.items():
        if raw.startswith(start):
            raise InputError(f"data file {path} is {kind}; save its rows as JSON lines, CSV or parquet")
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        raise InputError(f"data file {path} is no parquet file; it does not start with PAR1")
    if name.endswith(".arrow"):
        return _read_arrow(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"data file {path} is not readable UTF-8 text ({error})") from error
    if name.endswith((".csv", ".tsv")):
        return _parse_table(text, path, "\t" if name.endswith(".tsv") else None)
    if name.endswith(".txt") and not text.lstrip().startswith(("{", "[")):
        return _parse_paragraphs(text, path)
    return _parse_records(text, path)


def _parse_paragraphs(text: str, path: Path) -> Records:
    """Cuts plain text at its blank lines."""
    texts = (part.strip("\n") for part in re.split(r"\n[ \t\r]*\n", text.replace("\r\n", "\n")))
    return (({"text": part}, f"{path} paragraph {number}") for number, part in enumerate(filter(str.strip, texts), 1))


def _parse_table(text: str, path: Path, delimiter: str | None) -> Records:
    """Parses CSV with a header. Spreadsheets write semicolons where a comma is the decimal point."""
    header = text.split("\n", 1)[0]
    if delimiter is None:
        delimiter = ";" if ";" in header and "," not in header else ","
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise InputError(f"data file {path} is no valid CSV ({error})") from error
    finally:
        csv.field_size_limit(before)
    names = [name.strip() for name in rows[0]] if rows else []
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"data file {path} names column {repeated[0]!r} twice in its header")
    for number, row in enumerate((row for row in rows[1:] if row), 1):
        where = f"{path} row {number}"
        if len(row) != len(names):
            raise InputError(
                f"{where} has {len(row)} cells, and the header names {len(names)} columns ({', '.join(names)[:200]})"
            )
        yield {name: _read_cell(name, cell) for name, cell in zip(names, row, strict=True)}, where


def _read_cell(name: str, cell: str) -> object:
    """Returns a cell's text, its JSON list of objects where the column may hold one, or None if it is empty."""
    if name in _LISTS and cell.lstrip().startswith("["):
        value, _ = _parse(cell)
        if isinstance(value, list) and all(isinstance(item, dict | list) for item in value):
            return value
    return cell or None


def _read_parquet(raw: bytes, path: Path) -> Records:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "train") from error
    try:
        file = parquet.ParquetFile(io.BytesIO(raw))
        batches = [*file.iter_batches(_BATCH, columns=_choose(file.schema_arrow.names))]
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data file {path} is no readable parquet file ({first_line(error)})") from error
    return _read_batches(batches, path)


def _read_arrow(path: Path) -> Records:
    """Reads an Arrow file, as a stream or with an index. datasets writes streams."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtraError("pyarrow", "train") from error
    try:
        with pyarrow.memory_map(str(path)) as file:
            indexed = file.read(6) == b"ARROW1"
            file.seek(0)
            table = (pyarrow.ipc.open_file(file) if indexed else pyarrow.ipc.open_stream(file)).read_all()
            return _read_batches(table.select(_choose(table.column_names)).to_batches(_BATCH), path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data file {path} is no readable Arrow file ({first_line(error)})") from error


def _choose(names: Sequence[str]) -> list[str]:
    """Chooses the columns that rows are made of, or all for the error that names them."""
    return [name for name in names if name in KEYS] or list(names)


def _read_batches(batches: Sequence[Any], path: Path) -> Records:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield _drop_absent(record), f"{path} row {number}"


def _drop_absent(value: Any) -> Any:
    """Drops the keys without a value, which a table gives to each object that lacks what another one has."""
    if isinstance(value, dict):
        return {key: _drop_absent(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_drop_absent(item) for item in value]
    return value
