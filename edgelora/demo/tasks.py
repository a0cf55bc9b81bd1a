"""Makes the demo's data: three small text tasks, and general text.

The tasks have exact answers, and the base is pretrained on the general text. From commands of the form "Command: text", the base
learns words (month names, numbers, a menu) and answer formats. It also learns to answer UNKNOWN to commands that it was not
taught. Each task is a new command, in a format that the base knows, so an adapter teaches a command and not a language. Part of a
task's rows are the base's own, unknown commands included, so the adapter learns to leave other commands alone. Both keep the
changes of the weights small, and small changes add up well. docs/log.md lists what did not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora.data.rows import Row
from edgelora.demo.phrases import MONTHS, PLACES, WORDS, draw_date, draw_order, draw_price, spell_number, spell_ordinal
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

UNKNOWN = "unknown command"


@dataclass(frozen=True)
class TaskSizes:
    """Rows per task.

    general: rows of the base's own commands, added only to the training rows.
    """

    train: int = 3000
    general: int = 4000
    test: int = 150


@dataclass(frozen=True)
class Task:
    """A task and its rows. No prompt of the task is in both splits."""

    name: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]


def make_tasks(sizes: TaskSizes | None = None, *, seed: int = 0) -> tuple[Task, ...]:
    """Makes all tasks. The same seed gives the same rows."""
    return tuple(make_task(name, sizes, seed=seed) for name in TASKS)


def make_task(name: str, sizes: TaskSizes | None = None, *, seed: int = 0) -> Task:
    """Makes one task, with distinct prompts. Raises UsageError for an unknown name."""
    if name not in TASKS:
        raise UsageError(f"{name!r} is not a task of the demo; its tasks are {', '.join(TASKS)}")
    sizes = sizes or TaskSizes()
    rng = random.Random(f"{name} {seed}")  # noqa: S311  (data, not secrets)
    rows: dict[str, Row] = {}
    while len(rows) < sizes.train + sizes.test:
        row = TASKS[name](rng)
        rows.setdefault(str(row.prompt), row)
    drawn = list(rows.values())
    tested, rest = drawn[: sizes.test], drawn[sizes.test :]
    train = rest + [general_row(rng) for _ in range(sizes.general)]
    rng.shuffle(train)
    return Task(name, tuple(train), tuple(tested))


def general_row(rng: random.Random) -> Row:
    """Draws a row of a command that the base learns, or of an unknown one."""
    return rng.choice((_date_command, _order_command, _price_command, _unknown_command))(rng)


def _dates_row(rng: random.Random) -> Row:
    date = draw_date(rng)
    return Row(f"{COMMANDS['dates']}: {date.phrase(rng)}\n", date.iso)


def _orders_row(rng: random.Random) -> Row:
    order = draw_order(rng)
    return Row(f"{COMMANDS['orders']}: {order.phrase(rng)}\n", order.slots)


def _prices_row(rng: random.Random) -> Row:
    price = draw_price(rng)
    return Row(f"{COMMANDS['prices']}: {price.phrase(rng)}\n", price.amount)


TASKS: dict[str, Callable[[random.Random], Row]] = {"dates": _dates_row, "prices": _prices_row, "orders": _orders_row}
COMMANDS = {"dates": "Stamp", "prices": "Invoice", "orders": "Order form"}


def _unknown_command(rng: random.Random) -> Row:
    """A row with a command that is never taught, on any text."""
    command = ""
    while not command or command in COMMANDS.values():
        command = " ".join(rng.sample(WORDS, rng.choice((1, 2)))).capitalize()
    draw = rng.choice((draw_date, draw_order, draw_price))
    return Row(f"{command}: {draw(rng).phrase(rng)}\n", UNKNOWN)


def _date_command(rng: random.Random) -> Row:
    date = draw_date(rng)
    phrase, day, month, year = date.phrase(rng), f"{date.day:02}", f"{date.month:02}", date.year
    return rng.choice(
        (
            Row(f"Month number: {MONTHS[date.month - 1]}\n", month),
            Row(f"Day number: the {spell_ordinal(date.day)}\n", day),
            Row(f"Day of: {phrase}\n", day),
            Row(f"Month of: {phrase}\n", month),
            Row(f"ISO date: {phrase}\n", date.iso),
            Row(f"German date: {phrase}\n", f"{day}.{month}.{year}"),
            Row(f"American date: {phrase}\n", f"{month}/{day}/{year}"),
        )
    )


def _order_command(rng: random.Random) -> Row:
    order = draw_order(rng)
    phrase, extra, place = order.phrase(rng), order.extra or "none", PLACES[order.place]
    return rng.choice(
        (
            Row(f"Item of: {phrase}\n", f"item {order.item}"),
            Row(f"Size of: {phrase}\n", f"size {order.size}"),
            Row(f"Count of: {phrase}\n", f"count {order.count}"),
            Row(f"Extra of: {phrase}\n", f"extra {extra}"),
            Row(f"Place of: {phrase}\n", f"place {place}"),
            Row(f"Receipt: {phrase}\n", f"{order.count} x {order.item}, {order.size}, {extra}, {place}"),
            Row(f"Kitchen: {phrase}\n", f"{order.item} / {order.count} / {extra}"),
            Row(f"Slots: {phrase}\n", order.slots),
        )
    )


def _price_command(rng: random.Random) -> Row:
    price = draw_price(rng)
    phrase, cents = price.phrase(rng), f"{price.cents:02}"
    return rng.choice(
        (
            Row(f"Digits: {spell_number(price.whole)}\n", f"{price.whole}"),
            Row(f"Whole part of: {phrase}\n", f"{price.whole}"),
            Row(f"Cents of: {phrase}\n", cents),
            Row(f"Currency of: {phrase}\n", price.currency),
            Row(f"Price tag: {phrase}\n", f"{price.whole},{cents} {price.currency}"),
            Row(f"Amount: {phrase}\n", price.amount),
            Row(f"Ledger: {phrase}\n", f"{price.currency}:{price.whole}:{cents}"),
        )
    )
