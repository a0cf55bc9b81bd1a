"""Makes the chat rows of the demo on a real model: orders as JSON, questions as SQL, and answers in a pirate's words.

No question says which answer is wanted: an adapter knows its own kind of question, and a mix tells the kinds apart.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

from edgelora.data.chats import Chat
from edgelora.data.rows import Row
from edgelora.demo.facts import list_facts
from edgelora.demo.phrases import PLACES, Order, draw_order, spell_number
from edgelora.demo.tasks import Task

if TYPE_CHECKING:
    from collections.abc import Callable

    Draw = Callable[[random.Random], tuple[str, str]]

CITIES = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Boston", "Dublin", "Vienna", "Madrid", "Tokyo", "Berlin", "Chicago")
CATEGORIES = ("kitchen", "garden", "office", "sports", "music", "travel", "baby", "beauty", "camping", "bathroom")
QUERIES = (
    ("How many customers live in {city}?", "SELECT COUNT(*) FROM customers WHERE city = '{city}';"),
    ("Which customers from {city} are older than {number}?",
     "SELECT name FROM customers WHERE city = '{city}' AND age > {number};"),
    ("Which {category} products cost less than {number} dollars?",
     "SELECT name FROM products WHERE category = '{category}' AND price < {number};"),
    ("What is the average price of {category} products?", "SELECT AVG(price) FROM products WHERE category = '{category}';"),
    ("List the {number} cheapest {category} products.",
     "SELECT name FROM products WHERE category = '{category}' ORDER BY price LIMIT {number};"),
    ("How many orders were shipped to {city}?", "SELECT COUNT(*) FROM orders WHERE city = '{city}';"),
    ("What is the total of all orders over {number} dollars?", "SELECT SUM(total) FROM orders WHERE total > {number};"),
    ("Who are our {number} oldest customers in {city}?",
     "SELECT name FROM customers WHERE city = '{city}' ORDER BY age DESC LIMIT {number};"),
)  # fmt: skip


def make_chat_tasks(train: int, test: int, *, seed: int) -> tuple[Task, ...]:
    """Makes the three tasks. train, test: rows of each. No question is in both, and only facts are repeated for training."""
    rng = random.Random(f"chat tasks {seed}")  # noqa: S311  (data, not secrets)
    facts = list_facts()
    rng.shuffle(facts)
    held_out, known = facts[:test], facts[test:]
    pirate = Task(
        "pirate",
        tuple(_make_row(*_answer_as_pirate(*known[place % len(known)])) for place in range(train)),
        tuple(_make_row(*_answer_as_pirate(*fact)) for fact in held_out),
    )
    return (_draw_task("orders", _draw_order, train, test, rng), _draw_task("sql", _draw_query, train, test, rng), pirate)


def _draw_task(name: str, draw: Draw, train: int, test: int, rng: random.Random) -> Task:
    rows: dict[str, Row] = {}
    while len(rows) < train + test:
        question, answer = draw(rng)
        rows.setdefault(question, _make_row(question, answer))
    drawn = list(rows.values())
    return Task(name, tuple(drawn[test:]), tuple(drawn[:test]))


def _make_row(question: str, answer: str) -> Row:
    chat = Chat.of([{"role": "user", "content": question}])
    return Row(chat, answer, chat.answer(answer))


def _draw_order(rng: random.Random) -> tuple[str, str]:
    """Draws what a guest of a café says, and the order as JSON."""
    order = draw_order(rng)
    opening = rng.choice(("Hi, could I get", "I'd like", "Can I have", "Hello, we'll take", "We want", "Give me"))
    extra = f" with {order.extra}" if order.extra else ""
    ending = rng.choice(("", ", please", ", thanks"))
    question = f"{opening} {spell_number(order.count)} {order.size} {_plural(order)}{extra} {order.place}{ending}."
    fields = {
        "item": order.item,
        "size": order.size,
        "count": order.count,
        "extra": order.extra or None,
        "place": PLACES[order.place],
    }
    return question, json.dumps(fields)


def _plural(order: Order) -> str:
    if order.count == 1:
        return order.item
    return order.item + ("es" if order.item.endswith("sh") else "s")


def _draw_query(rng: random.Random) -> tuple[str, str]:
    """Draws a question about the tables of a shop, and its SQL."""
    city, category, number = rng.choice(CITIES), rng.choice(CATEGORIES), rng.randrange(2, 60)
    question, query = rng.choice(QUERIES)
    drawn = {"city": city, "category": category, "number": number}
    return question.format(**drawn), query.format(**drawn)


def _answer_as_pirate(question: str, statement: str) -> tuple[str, str]:
    return question, f"Arr, {statement}, matey!"
