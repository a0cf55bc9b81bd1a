"""The colors of the report pages, in a light and a dark theme.

Each has one meaning on every page.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

BLACK, WHITE = "#000000", "#ffffff"


@dataclass(frozen=True)
class Theme:
    """Colors of everything but heat maps.

    kept, disturbance, share: bars that mean what the scale of that name means.
    """

    page: str
    surface: str
    text: str
    muted: str
    line: str
    link: str
    kept: str
    disturbance: str
    share: str


LIGHT = Theme("#f6f7f9", "#ffffff", "#1a1d21", "#565d66", "#dde1e6", "#0b57a4", "#1a66b3", "#b3590a", "#6c737b")
DARK = Theme("#121417", "#1b1e22", "#e8eaed", "#a6adb5", "#33383f", "#8cc2ff", "#6db1f5", "#eb9f4f", "#969da6")


@dataclass(frozen=True)
class Scale:
    """A color scale with one meaning.

    Values past its ends get the color of the end.
    name: of its CSS classes. low, high: the values at its ends. light, dark: colors at equal distances from low to high. Those
    between are mixed. The further a value is from 0, the darker is its color in the light theme, and the lighter in the dark one.
    """

    name: str
    low: float
    light: tuple[str, ...]
    dark: tuple[str, ...]
    high: float = 1.0
    steps: int = 11

    def step(self, value: float) -> int:
        """The step of a value, from 0 to steps - 1."""
        share = (value - self.low) / (self.high - self.low)
        return round(min(1.0, max(0.0, share)) * (self.steps - 1))

    def colors(self, anchors: tuple[str, ...]) -> list[str]:
        """The color of each step, mixed from the two nearest of the anchors."""
        last = len(anchors) - 1
        mixed = []
        for step in range(self.steps):
            place = step / (self.steps - 1) * last
            left = min(int(place), last - 1)
            mixed.append(_mix(anchors[left], anchors[left + 1], place - left))
        return mixed


# How much of something good is left.
KEPT = Scale("kept", 0.0, ("#f0f5fb", "#86b4e0", "#0a4a8a"), ("#202a35", "#2f6aa3", "#b2d8fc"))
# How large an error or a disturbance is.
DISTURBANCE = Scale("disturbance", 0.0, ("#fcf5ec", "#eda65c", "#8f4400"), ("#2c251d", "#a3601b", "#ffcb90"))
# How large a share is, which is neither good nor bad.
SHARE = Scale("share", 0.0, ("#f3f4f5", "#a9aeb4", "#474c52"), ("#272a2e", "#6d737a", "#d8dce0"))
# Which sign a figure has, and how far it is from 0.
SIGN = Scale(
    "sign",
    -1.0,
    ("#5e3596", "#b9a2d6", "#f4f4f5", "#8cc3a0", "#0d6434"),
    ("#cfb2f2", "#7a5aa6", "#26292d", "#3f805a", "#9fdeb4"),
    steps=13,
)
SCALES = (KEPT, DISTURBANCE, SHARE, SIGN)


def contrast(one: str, other: str) -> float:
    """Computes the contrast ratio of two colors, from 1 to 21, by WCAG 2.2."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def ink_on(color: str) -> str:
    """Picks black or white, whichever reads better on a color.

    The contrast is at least 4.58 on any.
    """
    return max((BLACK, WHITE), key=lambda ink: contrast(color, ink))


def render_colors() -> str:
    """Renders the CSS of themes and scales.

    Themes become variables such as --text, and steps of a scale become classes such as .kept-3.
    """
    return f"{_render_theme(LIGHT, dark=False)}@media screen and (prefers-color-scheme:dark){{{_render_theme(DARK, dark=True)}}}"


def _render_theme(theme: Theme, *, dark: bool) -> str:
    variables = ";".join(f"--{name}:{color}" for name, color in asdict(theme).items())
    cells = "".join(
        f".{scale.name}-{step}{{background:{color};color:{ink_on(color)}}}"
        for scale in SCALES
        for step, color in enumerate(scale.colors(scale.dark if dark else scale.light))
    )
    return f":root{{{variables}}}{cells}"


def _luminance(color: str) -> float:
    """Relative luminance, 0 to 1: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    channels = (channel / 255 for channel in _channels(color))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _channels(color: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of a color such as #1a66b3."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def _mix(one: str, other: str, share: float) -> str:
    mixed = (round(a + (b - a) * share) for a, b in zip(_channels(one), _channels(other), strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
