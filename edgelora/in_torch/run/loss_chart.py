"""A picture of the losses of a run, as PNG, drawn with Pillow."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    Points = Sequence[tuple[int, float]]

_WIDTH, _HEIGHT = 960, 480  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 44, 48  # margins
_LIGHT, _BLUE, _ORANGE, _GREY, _BLACK = "#c9daf0", "#1f5fa8", "#d9660a", "#d8d8d8", "#303030"
_SMOOTHING = 20  # the smoothed line averages a share of one in this many of the steps


def draw_losses(training: Points, validation: Points) -> bytes:
    """Draws the training and validation losses, in nats, over the steps. Returns the bytes of a PNG."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=15)
    steps = max(step for step, _ in training)
    losses = [loss for _, loss in (*training, *validation)]
    ticks = choose_ticks(min(losses), max(losses))
    low, high = ticks[0], ticks[-1]

    def place(step: float, loss: float) -> tuple[float, float]:
        across = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / steps
        return across, _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - loss) / (high - low)

    for tick in ticks:
        (left, height), (right, _) = place(0, tick), place(steps, tick)
        draw.line((left, height, right, height), fill=_GREY)
        draw.text((left - 8, height), f"{tick:g}", fill=_BLACK, font=font, anchor="rm")
    for tick in choose_ticks(0, steps):
        if tick <= steps and tick == int(tick):
            across, bottom = place(tick, low)
            draw.text((across, bottom + 8), f"{tick:.0f}", fill=_BLACK, font=font, anchor="mt")
    draw.text((_WIDTH - _RIGHT, _HEIGHT - 6), "steps", fill=_BLACK, font=font, anchor="rs")
    lines: list[tuple[Points, str, int, str]] = [(training, _LIGHT, 1, ""), (smooth(training), _BLUE, 3, "training loss")]
    lines += [(validation, _ORANGE, 3, "validation loss")] if validation else []
    across = float(_LEFT)
    for points, colour, width, name in lines:
        _draw_line(draw, [place(step, loss) for step, loss in points], colour, width)
        if name:
            draw.line((across, 22, across + 24, 22), fill=colour, width=width)
            draw.text((across + 32, 22), name, fill=_BLACK, font=font, anchor="lm")
            across += 180
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _draw_line(draw: Any, places: Sequence[tuple[float, float]], colour: str, width: int) -> None:
    """Draws a line through places. One place alone is a dot."""
    if len(places) > 1:
        draw.line(list(places), fill=colour, width=width, joint="curve")
    elif places:
        across, height = places[0]
        draw.ellipse((across - 3, height - 3, across + 3, height + 3), fill=colour)


def smooth(points: Points) -> list[tuple[int, float]]:
    """Averages each loss with those of the steps around it.

    >>> smooth([(1, 3.0), (2, 1.0)])
    [(1, 3.0), (2, 1.0)]
    """
    reach = len(points) // (2 * _SMOOTHING)
    averaged = []
    for place, (step, _) in enumerate(points):
        around = points[max(0, place - reach) : place + reach + 1]
        averaged.append((step, sum(loss for _, loss in around) / len(around)))
    return averaged


def choose_ticks(low: float, high: float) -> list[float]:
    """Chooses four to ten round numbers around a range.

    >>> choose_ticks(0.3, 2.1)
    [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    """
    span = max(high - low, 1e-6)
    power = 10.0 ** math.floor(math.log10(span))
    unit = next(unit for unit in (power * share for share in (0.1, 0.2, 0.5, 1.0, 2.0)) if span / unit <= 8)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    return [round(unit * count, 10) for count in range(first, max(last, first + 1) + 1)]
