"""The demo's tasks: right answers, splits without shared prompts, the same rows for the same seed."""

from __future__ import annotations

import random

import pytest

from edgelora.demo import phrases
from edgelora.demo.tasks import COMMANDS, TASKS, UNKNOWN, TaskSizes, general_row, make_task, make_tasks
from edgelora_runtime.errors import UsageError

SIZES = TaskSizes(train=60, general=40, test=30)


def test_numbers_and_ordinals_are_spelled() -> None:
    assert [phrases.spell_number(n) for n in (0, 13, 20, 99, 100, 305)] == [
        "zero", "thirteen", "twenty", "ninety-nine", "one hundred", "three hundred and five",
    ]  # fmt: skip
    assert [phrases.spell_ordinal(n) for n in (1, 2, 3, 5, 8, 9, 12, 14, 20, 21, 28, 40)] == [
        "first", "second", "third", "fifth", "eighth", "ninth", "twelfth", "fourteenth", "twentieth", "twenty-first",
        "twenty-eighth", "fortieth",
    ]  # fmt: skip
    assert len({phrases.spell_number(n) for n in range(1000)}) == 1000


def test_answers_are_exact() -> None:
    assert phrases.Date(1994, 3, 7).iso == "1994-03-07"
    assert phrases.Order(2, "large", "latte", "", "to go").slots == "item: latte, size: large, count: 2, extra: none, place: away"
    assert phrases.Price(305, 7, "GBP").amount == "GBP 305.07"


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_prompt(name: str) -> None:
    task = make_task(name, SIZES, seed=3)
    assert (len(task.train), len(task.test)) == (100, 30)
    train, test = ({row.prompt for row in rows} for rows in (task.train, task.test))
    assert not train & test
    assert len(test) == 30


def test_rows_depend_on_the_seed_alone() -> None:
    assert make_tasks(SIZES, seed=1) == make_tasks(SIZES, seed=1)
    assert make_tasks(SIZES, seed=1) != make_tasks(SIZES, seed=2)


def test_base_never_sees_a_task() -> None:
    """No general row has a task's command, but every word of the commands occurs in general rows."""
    rng = random.Random(0)
    rows = [general_row(rng) for _ in range(5000)]
    commands = {str(row.prompt).partition(":")[0] for row in rows}
    assert not commands & set(COMMANDS.values())
    assert any(row.completion == UNKNOWN for row in rows)


def test_every_prompt_ends_its_line_and_every_completion_is_bare() -> None:
    """This keeps the prompt's tokens the same with and without a completion."""
    for task in make_tasks(SIZES):
        for row in (*task.train, *task.test):
            assert str(row.prompt).endswith("\n")
            assert row.completion == row.completion.strip()


def test_unknown_task_is_named() -> None:
    with pytest.raises(UsageError, match="'songs' is not a task"):
        make_task("songs", SIZES)
