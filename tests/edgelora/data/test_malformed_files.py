"""Forty files that are wrong: one line each, with the file, the row and the shape that was expected. Exit code 3."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgelora.data.rows import read_rows
from edgelora_runtime.errors import InputError

GOOD = {"prompt": "the cat", "completion": " sat"}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in (GOOD, *records)).encode()


def call(**function: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": function}]}]}


MALFORMED: dict[str, tuple[str, bytes, str]] = {
    "empty": ("rows.jsonl", b"", "holds no rows; a row is {"),
    "white space": ("rows.jsonl", b" \n\n\t\n", "holds no rows"),
    "empty array": ("rows.json", b"[]", "holds no rows"),
    "cut array": (
        "rows.json",
        b'[{"prompt": "a", "completion": "b"}, {"prom',
        "starts as a JSON array and is none (Unterminated",
    ),
    "cut line": ("rows.jsonl", lines() + b'{"prompt": "a", "compl', "line 2 is not JSON (Unterminated string"),
    "single quotes": ("rows.jsonl", lines() + b"{'prompt': 'a'}", "line 2 is not JSON (Expecting property name"),
    "no UTF-8": ("rows.jsonl", lines() + b'{"prompt": "\xe4"}', "is not readable UTF-8 text"),
    "half a surrogate": (
        "rows.jsonl",
        lines() + b'{"text": "a \\ud83d"}',
        r"line 2: text holds \ud83d, half of a surrogate pair",
    ),
    "deep": ("rows.jsonl", lines() + b"[" * 100_000, "line 2 is not JSON (maximum recursion depth"),
    "a number": ("rows.json", b"[3]", "row 1 is int, not an object such as {"),
    "a list": ("rows.jsonl", lines([1]), "line 2 is list, not an object"),
    "null": ("rows.jsonl", lines(None), "line 2 is NoneType"),
    "unknown keys": (
        "rows.jsonl",
        lines({"question": "a", "answer": "b"}),
        "line 2 has question, answer, which is no known shape; expected {",
    ),
    "no completion": (
        "rows.jsonl",
        lines({"prompt": "a"}),
        'line 2 has no completion; the shape prompt-completion is {"prompt": …',
    ),
    "empty completion": ("rows.jsonl", lines({"prompt": "a", "completion": ""}), "line 2 has an empty completion; the shape"),
    "text and list": (
        "rows.jsonl",
        lines({"prompt": [USER], "completion": "b"}),
        "line 2: prompt is a list of messages, and completion is str",
    ),
    "a number as prompt": ("rows.jsonl", lines({"prompt": 3, "completion": "b"}), "line 2 has no prompt that is text; the shape"),
    "answered prompt": (
        "rows.jsonl",
        lines({"prompt": [USER, ASSISTANT], "completion": [ASSISTANT]}),
        "line 2: the prompt ends with an assistant",
    ),
    "no messages": (
        "rows.jsonl",
        lines({"messages": []}),
        'line 2 is no list of messages; each is {"role": …, "content": …}; the shape',
    ),
    "messages as text": ("rows.jsonl", lines({"messages": "hello"}), "line 2: messages is text, and no JSON of a list"),
    "no role": ("rows.jsonl", lines({"messages": [{"content": "a"}]}), "line 2: message 1 has no role"),
    "an image": (
        "rows.jsonl",
        lines({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        "line 2: message 1 has a part of type 'image'",
    ),
    "the user's last word": ("rows.jsonl", lines({"messages": [USER, ASSISTANT, USER]}), "line 2 ends with a message of 'user'"),
    "an answer alone": ("rows.jsonl", lines({"messages": [ASSISTANT]}), "line 2 holds an answer alone"),
    "a nameless call": (
        "rows.jsonl",
        lines(call(arguments={})),
        "line 2: message 2 has a tool call without the name of a function",
    ),
    "cut arguments": (
        "rows.jsonl",
        lines(call(name="clock", arguments="{")),
        "line 2: message 2: the arguments of clock are not JSON",
    ),
    "tools as a number": (
        "rows.jsonl",
        lines({"messages": [USER, ASSISTANT], "tools": 3}),
        "line 2: tools is no list of objects",
    ),
    "no output": (
        "rows.jsonl",
        lines({"instruction": "a", "input": ""}),
        'line 2: output is absent, not text; the shape alpaca is {"instr',
    ),
    "empty instruction": (
        "rows.jsonl",
        lines({"instruction": "", "output": "b"}),
        "line 2: instruction is empty; the shape alpaca",
    ),
    "a flat history": (
        "rows.jsonl",
        lines({"instruction": "a", "output": "b", "history": ["q", "a"]}),
        "line 2: turn 1 of history is not [question, answer]",
    ),
    "conversations as an object": (
        "rows.jsonl",
        lines({"conversations": HUMAN}),
        "line 2: conversations is dict, not a list; the shape sharegpt",
    ),
    "an unknown speaker": (
        "rows.jsonl",
        lines({"conversations": [{"from": "narrator", "value": "a"}, GPT]}),
        "line 2: turn 1 is from 'narrator'; known are human",
    ),
    "no value": (
        "rows.jsonl",
        lines({"conversations": [{"from": "human"}, GPT]}),
        "line 2: turn 1 has no from and value as text",
    ),
    "a broken call": (
        "rows.jsonl",
        lines({"conversations": [HUMAN, {"from": "function_call", "value": "clock()"}]}),
        "line 2: turn 2, a function_call, is not JSON",
    ),
    "empty text": ("rows.jsonl", lines({"text": " "}), 'line 2: text is empty; the shape text is {"text": …}'),
    "too many cells": (
        "rows.csv",
        b"prompt,completion\na,b\nc,d,e\n",
        "row 2 has 3 cells, and the header names 2 columns (prompt, completion)",
    ),
    "an open quote": ("rows.csv", b'prompt,completion\na,"b\n', "is no valid CSV (unexpected end of data)"),
    "a column twice": ("rows.csv", b"prompt,prompt\na,b\n", "names column 'prompt' twice in its header"),
    "other columns": ("rows.csv", b"question,answer\na,b\n", "row 1 has question, answer, which is no known shape"),
    "a header alone": ("rows.csv", b"prompt,completion\n", "holds no rows"),
    "an empty cell": ("rows.tsv", b"prompt\tcompletion\na\tb\nc\t\n", "row 2 has no completion; the shape prompt-completion"),
    "cut parquet": ("rows.parquet", b"PAR1 and no more", "is no readable parquet file ("),
    "no parquet": ("rows.parquet", b'{"prompt": "a"}', "is no parquet file; it does not start with PAR1"),
    "no arrow": ("rows.arrow", b"rows", "is no readable Arrow file ("),
    "cut gzip": ("rows.jsonl.gz", gzip.compress(lines())[:20], "cannot be read (Compressed file ended"),
    "a spreadsheet": (
        "rows.xlsx",
        b"PK\x03\x04" + bytes(20),
        "is a zip archive or a spreadsheet; save its rows as JSON lines, CSV or parquet",
    ),
    "zstd": ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(20), "is compressed with zstd; save its rows"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_one_line(name: str, tmp_path: Path) -> None:
    file, content, mention = MALFORMED[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_rows(tmp_path / file)
    line = str(raised.value)
    assert mention in line
    assert file in line and "\n" not in line and raised.value.exit_code == 3


def test_there_are_forty() -> None:
    assert len(MALFORMED) >= 40


def test_missing_data_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "saved" / "test").mkdir(parents=True)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    (tmp_path / "saved" / "test" / "state.json").write_text("{}")
    for path, mention in (
        (tmp_path / "rows.jsonl", "does not exist; give an existing file"),
        (tmp_path / "empty", "holds no file of data (.jsonl, .ndjson"),
        (tmp_path / "saved", "has the splits test, and none named train; give the folder of one"),
        (Path("nobody/rows.jsonl"), "data file nobody/rows.jsonl does not exist; give an existing file"),
        (
            Path("nobody/rows"),
            "the hub's cache has no data set of that name; give an existing file, or fetch the data set with: hf download",
        ),
    ):
        with pytest.raises(InputError) as raised:
            read_rows(path)
        assert mention in str(raised.value)


def test_as_a_command(tmp_path: Path) -> None:
    """The base is not looked at before the rows are read."""
    (tmp_path / "rows.csv").write_bytes(MALFORMED["too many cells"][1])
    command = [sys.executable, "-m", "edgelora", "train", "--base", "absent", "--data", "rows.csv", "--output", "adapter"]
    root = Path(__file__).resolve().parents[3]
    path = os.pathsep.join(str(root / part) for part in (".", "export", "runtime"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.strip().splitlines()
    assert "rows.csv row 2 has 3 cells, and the header names 2 columns (prompt, completion)" in line
