"""`edgelora train --inspect`: shows rows as training would see them, and trains nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from edgelora.cli.terminal import print_json, print_line, print_note
from edgelora_runtime.errors import make_printable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgelora.data.inspect_rows import SeenRow, SeenRows

_OPEN, _CLOSE = "⟦", "⟧"  # around text with loss, where there are no colours
_BAR = 40  # characters of the longest bar
_LONGEST = 4000  # characters of a row that are shown


def show_rows(
    base: str,
    data: Path,
    *,
    format: str = "auto",  # noqa: A002 - the option's name
    max_length: int = 1024,
    template_options: Mapping[str, Any] | None = None,
    json: bool = False,
) -> None:
    """Prints five rows with the text that carries loss marked, the lengths of all, and how many are cut or left out.

    The arguments are TrainConfig's. Loads the base's tokenizer, and none of its weights. Raises InputError for rows or a base
    that training would refuse.
    """
    from edgelora.data.encode_rows import RowEncoder
    from edgelora.data.inspect_rows import inspect_rows
    from edgelora.data.rows import read_rows
    from edgelora_export.base.base import Base
    from edgelora_export.base.tokenizer import load_tokenizer

    rows = read_rows(data, format)
    encoder = RowEncoder(load_tokenizer(Base.find(base)), template_options)
    seen = inspect_rows(encoder, rows, max_length)
    if json:
        _print_as_json(seen, data, max_length)
        return
    for sample in seen.samples:
        _print_sample(sample, max_length)
    _print_lengths(seen)
    print_line(
        f"rows {seen.rows}; cut to {max_length} tokens {seen.rows_cut}; left out, with nothing to learn within them, "
        f"{seen.rows_left_out}; tokens of the rest {seen.tokens}, with loss {seen.learned}"
    )
    print_line("loss is told by: " + ", ".join(f"{way} {count}" for way, count in sorted(seen.loss_on.items())))
    print_note("nothing was trained; leave out --inspect to train")


def _print_sample(sample: SeenRow, max_length: int) -> None:
    """Prints a row's text, in colours on a terminal and between marks elsewhere."""
    cut = f", cut to {max_length}" if sample.tokens > max_length else ""
    print_line(f"{sample.place}: {sample.tokens} tokens{cut}, {sample.learned} with loss ({sample.loss_on})")
    if not sys.stdout.isatty():
        text = "".join(f"{_OPEN}{piece}{_CLOSE}" if learned else piece for piece, learned in sample.pieces)
        print("\n".join(map(_clean, _shorten(text).split("\n"))))
        print_line()
        return
    from rich.console import Console
    from rich.text import Text

    coloured = Text()
    for piece, learned in sample.pieces:
        lines = "\n".join(map(_clean, _shorten(piece).split("\n")))
        coloured.append(lines, style="bold green" if learned else "dim")
    Console(highlight=False).print(coloured, soft_wrap=True)
    print_line()


def _clean(line: str) -> str:
    """Returns a line without what a terminal would obey. It is as long as a row may be."""
    return make_printable(line, _LONGEST)


def _shorten(text: str) -> str:
    """Cuts the middle out of a long text."""
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} … {text[-half:]}"


def _print_lengths(seen: SeenRows) -> None:
    """Prints the histogram of lengths: the rows of each bin, and a bar as long as its share of the fullest one."""
    bins = seen.histogram()
    most = max(count for _, _, count in bins)
    digits, places = len(str(bins[-1][1])), len(str(most))
    for first, last, count in bins:
        bar = "█" * -(-_BAR * count // most)
        print_line(f"{first:{digits}}–{last:{digits}} tokens  {count:{places}}  {bar}".rstrip())


def _print_as_json(seen: SeenRows, data: Path, max_length: int) -> None:
    lengths = seen.lengths
    value: dict[str, Any] = {"data": data, "max_length": max_length, **vars(seen)}
    value["lengths"] = {
        "shortest": lengths[0],
        "median": lengths[len(lengths) // 2],
        "longest": lengths[-1],
        "histogram": [{"from": first, "to": last, "rows": count} for first, last, count in seen.histogram()],
    }
    value["samples"] = [
        {**vars(sample), "pieces": [{"text": text, "learned": learned} for text, learned in sample.pieces]}
        for sample in seen.samples
    ]
    print_json(value)
