"""The rows of the demo on a real model: held-out questions, JSON that parses, and SQL that runs."""

from __future__ import annotations

import json
import sqlite3
from typing import TYPE_CHECKING

import pytest

from edgelora.data.rows import read_rows
from edgelora.demo.chat_tasks import QUERIES, make_chat_tasks
from edgelora.demo.run import write_demo_rows

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora.data.rows import Row
    from edgelora.demo.tasks import Task

SCHEMA = """
CREATE TABLE customers (name TEXT, city TEXT, age INTEGER);
CREATE TABLE products (name TEXT, category TEXT, price REAL);
CREATE TABLE orders (city TEXT, total REAL);
"""


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {task.name: task for task in make_chat_tasks(160, 20, seed=3)}


def test_tested_questions_are_held_out(tasks: dict[str, Task]) -> None:
    assert list(tasks) == ["orders", "sql", "pirate"]
    for task in tasks.values():
        assert (len(task.train), len(task.test)) == (160, 20)
        tested = {row.prompt for row in task.test}
        assert len(tested) == 20
        assert not tested & {row.prompt for row in task.train}


def test_a_seed_draws_the_same_rows_again(tasks: dict[str, Task]) -> None:
    assert make_chat_tasks(160, 20, seed=3) == tuple(tasks.values())
    assert make_chat_tasks(160, 20, seed=4) != tuple(tasks.values())


def test_answers_have_their_form(tasks: dict[str, Task]) -> None:
    for row in tasks["orders"].train:
        assert set(json.loads(row.completion)) == {"item", "size", "count", "extra", "place"}
    for row in tasks["pirate"].train:
        assert row.completion.startswith("Arr, ")
        assert row.completion.endswith(", matey!")
        assert " be " in row.completion


def test_queries_run(tasks: dict[str, Task]) -> None:
    with sqlite3.connect(":memory:") as shop:
        shop.executescript(SCHEMA)
        for row in (*tasks["sql"].train, *tasks["sql"].test):
            shop.execute(row.completion)
    assert len({row.completion.split(" ")[1] for row in tasks["sql"].train}) > 2
    assert len(QUERIES) == len({question for question, _ in QUERIES})


def test_rows_are_read_back_as_written(tasks: dict[str, Task], tmp_path: Path) -> None:
    rows = tasks["orders"].train[:5]
    read = read_rows(write_demo_rows(tmp_path / "data" / "orders.jsonl", rows))
    assert [_describe(row) for row in read] == [_describe(row) for row in rows]


def _describe(row: Row) -> tuple[str, str]:
    return str(row.prompt), row.completion
