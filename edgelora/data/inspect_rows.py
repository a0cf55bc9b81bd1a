"""What training would see of rows: lengths, what is cut or left out, and the texts that carry loss."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from edgelora.data.encode_rows import fit_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgelora.data.encode_rows import LearnedTokens, RowEncoder
    from edgelora.data.rows import Row

_BINS = 10


@dataclass(frozen=True)
class SeenRow:
    """A row as training sees it.

    place: its file and line. tokens: how many it has before it is cut. learned: how many of those that are kept carry loss.
    loss_on: as RowEncoder.describe_mask. pieces: the text that is kept, in runs of tokens with and without loss.
    """

    place: str
    tokens: int
    learned: int
    loss_on: str
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class SeenRows:
    """All rows as training sees them.

    rows: their number. rows_cut, rows_left_out: those longer than max_length, and those with nothing to learn within it. tokens,
    learned: of the rows that are kept. lengths: of all rows, in tokens, ascending. loss_on: how many rows tell by what which
    tokens carry loss. samples: a few rows, from the first to the last.
    """

    rows: int
    rows_cut: int
    rows_left_out: int
    tokens: int
    learned: int
    lengths: tuple[int, ...]
    loss_on: Mapping[str, int]
    samples: tuple[SeenRow, ...]

    def histogram(self) -> list[tuple[int, int, int]]:
        """Counts rows by length: the shortest and longest length of each bin, and its rows. Bins are equally wide."""
        first, last = self.lengths[0], self.lengths[-1]
        width = -(-(last - first + 1) // _BINS)
        bins = Counter((length - first) // width for length in self.lengths)
        return [(first + place * width, first + (place + 1) * width - 1, bins[place]) for place in range(max(bins) + 1)]


def inspect_rows(encoder: RowEncoder, rows: Sequence[Row], max_length: int, samples: int = 5) -> SeenRows:
    """Encodes rows for training, and says what becomes of them. rows: at least one."""
    encoded = [encoder.learn(row) for row in rows]
    kept, cut = fit_rows(encoded, max_length)
    shown = sorted({number * (len(rows) - 1) // max(1, samples - 1) for number in range(samples)})
    return SeenRows(
        rows=len(rows),
        rows_cut=cut,
        rows_left_out=len(rows) - len(kept),
        tokens=sum(len(row.tokens) for row in kept),
        learned=sum(sum(row.learned) for row in kept),
        lengths=tuple(sorted(len(row.tokens) for row in encoded)),
        loss_on=encoder.count_masks(rows),
        samples=tuple(_see(encoder, rows[place], encoded[place], max_length) for place in shown),
    )


def _see(encoder: RowEncoder, row: Row, encoded: LearnedTokens, max_length: int) -> SeenRow:
    kept = encoded.cut(max_length)
    pieces = []
    for learned, run in groupby(zip(kept.tokens, kept.learned, strict=True), key=lambda pair: pair[1]):
        text = encoder.tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        pieces.append((text, learned))
    return SeenRow(row.place, len(encoded.tokens), sum(kept.learned), encoder.describe_mask(row), tuple(pieces))
