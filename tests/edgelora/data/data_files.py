"""Rows of each shape, and writers of each format that people keep them in."""

from __future__ import annotations

import csv
import gzip
import json
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow
import pyarrow.parquet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Records = Sequence[dict[str, Any]]

QUESTIONS = ("the cat", 'a day, "in" the sun', "one\ntwo; three")
ANSWERS = ("sat on the mat", "and the moon", "four\n\nGröße 🙂")
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}},
}
TURNS = list(zip(QUESTIONS, ANSWERS, strict=True))


def ask(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def call(zone: str) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {"zone": zone}}}]}


def with_call(question: str, right: str) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "Be brief."},
        ask(question),
        call("UTC"),
        {"role": "tool", "content": "12:00"},
        answer(right),
    ]


# Of each shape: three records, and the conversation (or text) that each stands for.
SHAPED: dict[str, tuple[Records, Sequence[Any]]] = {
    "messages": (
        [{"messages": [ask(q), answer(a), ask("again"), answer("the mat")]} for q, a in TURNS],
        [[ask(q), answer(a), ask("again"), answer("the mat")] for q, a in TURNS],
    ),
    "tools": ([{"messages": with_call(q, a), "tools": [CLOCK]} for q, a in TURNS], [with_call(q, a) for q, a in TURNS]),
    "texts": ([{"prompt": q, "completion": f" {a}"} for q, a in TURNS], [(q, f" {a}") for q, a in TURNS]),
    "message lists": (
        [{"prompt": [ask(q)], "completion": [answer(a)]} for q, a in TURNS],
        [[ask(q), answer(a)] for q, a in TURNS],
    ),
    "alpaca": (
        [{"instruction": q, "input": extra, "output": a} for (q, a), extra in zip(TURNS, ("", "four", "moon"), strict=True)],
        [[ask(q + extra), answer(a)] for (q, a), extra in zip(TURNS, ("", "\nfour", "\nmoon"), strict=True)],
    ),
    "sharegpt": (
        [
            {
                "system": "Be brief.",
                "conversations": [
                    {"from": "human", "value": q},
                    {"from": "function_call", "value": json.dumps({"name": "clock", "arguments": {"zone": "UTC"}})},
                    {"from": "observation", "value": "12:00"},
                    {"from": "gpt", "value": a},
                ],
                "tools": json.dumps([CLOCK["function"]]),
            }
            for q, a in TURNS
        ],
        [with_call(q, a) for q, a in TURNS],
    ),
    "text": ([{"text": f"{q} {a}"} for q, a in TURNS], [("", f"{q} {a}") for q, a in TURNS]),
}


def write_lines(folder: Path, records: Records) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_array(folder: Path, records: Records) -> Path:
    path = folder / "rows.json"
    path.write_text("\ufeff" + json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def write_csv(folder: Path, records: Records) -> Path:
    path = folder / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        for record in records:
            writer.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in record.items()})
    return path


def write_parquet(folder: Path, records: Records) -> Path:
    path = folder / "rows.parquet"
    numbered = [{"id": number, **record} for number, record in enumerate(records)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(numbered), path, row_group_size=2)
    return path


def write_folder(folder: Path, records: Records) -> Path:
    """Two files of training data in two formats, and files that are none."""
    (folder / "data").mkdir()
    with gzip.open(folder / "data" / "train-00000.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records[:2])
    write_array(folder, records[2:]).rename(folder / "data" / "train-00001.json")
    (folder / "data" / "test-00000.jsonl").write_text('{"prompt": "never", "completion": "read"}\n')
    (folder / "README.md").write_text("# a data set")
    (folder / "LICENSE.txt").write_text("free")
    return folder


def write_saved(folder: Path, records: Records) -> Path:
    """A DatasetDict whose rows are chosen by indices."""
    reordered = datasets.Dataset.from_list([records[2], records[0], records[1], records[0]])
    splits = datasets.DatasetDict({"train": reordered.select([1, 2, 0]), "test": reordered.select([3])})
    splits.save_to_disk(str(folder / "saved"), num_shards={"train": 2, "test": 1})
    return folder / "saved"


def write_cached(folder: Path, records: Records) -> Path:
    """A data set as huggingface_hub keeps it in its cache."""
    cached = folder / "hub" / "datasets--someone--rows"
    snapshot = cached / "snapshots" / ("a" * 40)
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    snapshot.mkdir(parents=True)
    write_parquet(snapshot, records).rename(snapshot / "train-00000-of-00001.parquet")
    return folder


WRITERS: dict[str, Callable[[Path, Records], Path]] = {
    "lines": write_lines,
    "array": write_array,
    "csv": write_csv,
    "parquet": write_parquet,
    "folder": write_folder,
    "saved": write_saved,
    "cached": write_cached,
}
