"""Draws random dates, orders and prices, and spells them in English."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

UNITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth",
}  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip
ITEMS = ("latte", "mocha", "espresso", "tea", "cocoa", "bagel", "muffin", "waffle", "salad", "soup", "pizza", "burger")
SIZES = ("small", "medium", "large")
EXTRAS = ("oat milk", "honey", "cinnamon", "cheese", "chili", "mint", "lemon", "ginger")
PLACES = {"to go": "away", "for here": "inside", "by courier": "home"}
CURRENCIES = {"EUR": ("euros", "cents"), "USD": ("dollars", "cents"), "GBP": ("pounds", "pence")}
# Unknown commands are made of these words.
WORDS = (
    "stamp", "order", "form", "invoice", "note", "list", "code", "sheet", "card", "entry", "line", "record", "paper", "slip",
    "bill", "plan", "table", "sign", "mark", "page", "draft", "memo", "report", "key", "text", "brief", "log", "board",
)  # fmt: skip


@dataclass(frozen=True)
class Date:
    """A day between 1900 and 2099, at most the 28th."""

    year: int
    month: int
    day: int

    def phrase(self, rng: random.Random) -> str:
        """The date in words, the year in digits."""
        month, day = MONTHS[self.month - 1], spell_ordinal(self.day)
        return rng.choice((f"the {day} of {month}, {self.year}", f"{month} the {day}, {self.year}"))

    @property
    def iso(self) -> str:
        """The date as ISO 8601 writes it."""
        return f"{self.year}-{self.month:02}-{self.day:02}"


@dataclass(frozen=True)
class Order:
    """One line of an order in a café. extra is empty for none."""

    count: int
    size: str
    item: str
    extra: str
    place: str

    def phrase(self, rng: random.Random) -> str:
        """The order as a guest says it."""
        opening = rng.choice(("", "please ", "can I have ", "I want "))
        extra = f" with {self.extra}" if self.extra else ""
        return f"{opening}{spell_number(self.count)} {self.size} {self.item}{extra} {self.place}"

    @property
    def slots(self) -> str:
        """The order as slots."""
        extra, place = self.extra or "none", PLACES[self.place]
        return f"item: {self.item}, size: {self.size}, count: {self.count}, extra: {extra}, place: {place}"


@dataclass(frozen=True)
class Price:
    """An amount of money below 1000."""

    whole: int
    cents: int
    currency: str

    def phrase(self, rng: random.Random) -> str:  # noqa: ARG002  (same signature as the others)
        """The amount in words."""
        major, minor = CURRENCIES[self.currency]
        return f"{spell_number(self.whole)} {major} and {spell_number(self.cents)} {minor}"

    @property
    def amount(self) -> str:
        """The amount in digits, after the currency code."""
        return f"{self.currency} {self.whole}.{self.cents:02}"


def draw_date(rng: random.Random) -> Date:
    """A date with a day that every month has."""
    return Date(rng.randrange(1900, 2100), rng.randrange(1, 13), rng.randrange(1, 29))


def draw_order(rng: random.Random) -> Order:
    """An order of one to nine items. 70% have an extra."""
    extra = rng.choice(EXTRAS) if rng.random() < 0.7 else ""
    return Order(rng.randrange(1, 10), rng.choice(SIZES), rng.choice(ITEMS), extra, rng.choice(list(PLACES)))


def draw_price(rng: random.Random) -> Price:
    """A price whose units and cents are both plural."""
    return Price(rng.randrange(2, 1000), rng.randrange(2, 100), rng.choice(list(CURRENCIES)))


def spell_number(number: int) -> str:
    """An integer from 0 to 999 in English words.

    >>> spell_number(342)
    'three hundred and forty-two'
    """
    if number >= 100:
        rest = number % 100
        return f"{UNITS[number // 100]} hundred" + (f" and {spell_number(rest)}" if rest else "")
    if number >= 20:
        return TENS[number // 10] + (f"-{UNITS[number % 10]}" if number % 10 else "")
    return (UNITS + TEENS)[number]


def spell_ordinal(number: int) -> str:
    """An integer from 1 to 99 as an English ordinal.

    >>> spell_ordinal(22)
    'twenty-second'
    """
    head, dash, last = spell_number(number).rpartition("-")
    ending = ORDINALS.get(last) or (f"{last[:-1]}ieth" if last.endswith("y") else f"{last}th")
    return head + dash + ending
