"""Scores written completions against the right ones: exact match, slot F1, ROUGE-L, and what a pattern finds."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from edgelora_runtime.errors import InputError, MissingExtraError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

Slots = Counter[tuple[str, str]]


def exact_match(written: Sequence[str], right: Sequence[str]) -> float:
    """The share of completions that match exactly, ignoring surrounding white space."""
    return sum(one.strip() == other.strip() for one, other in zip(written, right, strict=True)) / len(right)


def main_score(written: Sequence[str], right: Sequence[str]) -> float:
    """Slot F1 if the right completions are slots, else exact match."""
    f1 = slot_f1(written, right)
    return exact_match(written, right) if f1 is None else f1


def parse_slots(text: str) -> Slots | None:
    """Parses slots of the form `name = value; name = value`.

    `none` has no slots. Returns None for text of any other form.

    >>> sorted(parse_slots("size = large; item = tea"))
    [('item', 'tea'), ('size', 'large')]
    """
    text = text.strip()
    if text == "none":
        return Counter()
    pairs = [item.partition("=") for item in text.split(";")]
    if not all(name.strip() and sign and value.strip() for name, sign, value in pairs):
        return None
    return Counter((name.strip(), value.strip()) for name, _, value in pairs)


def slot_f1(written: Sequence[str], right: Sequence[str]) -> float | None:
    """Returns the micro-averaged F1 over (slot, value) pairs.

    None if the right completions are not slots. A written completion that is not in slot form counts as having no slots.
    """
    counts = _count_slots(written, right)
    return None if counts is None else sum(hits for hits, _ in counts) / sum(pairs for _, pairs in counts)


def count_scores(written: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]]:
    """Returns a numerator and a denominator per row.

    main_score is the quotient of their sums.
    """
    slots = _count_slots(written, right)
    return slots or [(one.strip() == other.strip(), 1) for one, other in zip(written, right, strict=True)]


def rouge_l(written: Sequence[str], right: Sequence[str]) -> list[float]:
    """Returns ROUGE-L's F-measure per row, on stemmed words, as the package rouge-score computes it."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("rouge-score", "eval") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [float(scorer.score(other, one)["rougeL"].fmeasure) for one, other in zip(written, right, strict=True)]


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compiles a regular expression of the user's. Raises UsageError if it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--regex {pattern}: not a regular expression ({error})") from error


def match_found(written: Sequence[str], right: Sequence[str], pattern: re.Pattern[str], places: Sequence[str] = ()) -> list[bool]:
    """Tells per row whether the pattern finds the same in both completions.

    What it finds is its first group, or all of the match if it has none, without surrounding white space. places: names the rows
    in the InputError for a right completion in which it finds nothing.
    """
    wanted = [_find(text, pattern) for text in right]
    if None in wanted:
        number = wanted.index(None)
        where = places[number] if places and places[number] else f"row {number + 1}"
        raise InputError(f"{where}: the right answer has no match for --regex {pattern.pattern}")
    return [_find(text, pattern) == found for text, found in zip(written, wanted, strict=True)]


def _find(text: str, pattern: re.Pattern[str]) -> str | None:
    found = pattern.search(text)
    if found is None:
        return None
    text = found[1] if pattern.groups else found[0]
    return None if text is None else text.strip()


def _count_slots(written: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]] | None:
    """Counts per row twice the right pairs, and the pairs in both texts.

    Returns None if the right completions are not slots.
    """
    truths = [parse_slots(text) for text in right]
    if any(truth is None for truth in truths) or not any(truths):
        return None
    counts = []
    for text, truth in zip(written, truths, strict=True):
        assert truth is not None
        guess = parse_slots(text) or Counter()
        counts.append((2 * (guess & truth).total(), guess.total() + truth.total()))
    return counts
