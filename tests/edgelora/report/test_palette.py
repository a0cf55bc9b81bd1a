"""The palette's contrasts by the formula of WCAG, and scales that read in greys too."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from edgelora.report.palette import DARK, LIGHT, SCALES, SIGN, Scale, Theme, contrast, ink_on, render_colors

SIDES = [(scale, side) for scale in SCALES for side in ("light", "dark")]


def colors(scale: Scale, side: str) -> list[str]:
    return scale.colors(getattr(scale, side))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("#000000", "#ffffff", 21.0), ("#777777", "#ffffff", 4.478), ("#ff0000", "#ffffff", 3.998), ("#0000ff", "#000000", 2.444)],
)
def test_contrast_is_that_of_wcag(one: str, other: str, expected: float) -> None:
    assert contrast(one, other) == contrast(other, one) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_reads_well_and_bars_stand_out(theme: Theme) -> None:
    for ground in (theme.page, theme.surface):
        assert all(contrast(ink, ground) >= 4.5 for ink in (theme.text, theme.muted, theme.link))
        assert all(contrast(bar, ground) >= 3 for bar in (theme.kept, theme.disturbance, theme.share))
    assert contrast(theme.surface, theme.kept) >= 4.5, "the text of a filled chip"


@pytest.mark.parametrize(("scale", "side"), SIDES, ids=lambda value: getattr(value, "name", value))
def test_figures_read_well_on_every_step(scale: Scale, side: str) -> None:
    assert all(contrast(ink_on(color), color) >= 4.5 for color in colors(scale, side))


@pytest.mark.parametrize(("scale", "side"), SIDES, ids=lambda value: getattr(value, "name", value))
def test_scales_are_in_order_without_hue(scale: Scale, side: str) -> None:
    """Each step away from 0 is darker in the light theme and lighter in the dark one, so that no hue has to be seen."""
    steps = colors(scale, side)
    middle = scale.step(0.0)
    ground = "#ffffff" if side == "light" else "#000000"
    for away in (steps[middle:], steps[middle::-1]):
        assert all(contrast(near, ground) < contrast(far, ground) for near, far in pairwise(away))


def test_signs_differ_by_more_than_a_hue_that_some_cannot_see() -> None:
    """Purple is bluer than green: the blue channel, which all but a few see, tells the ends apart."""
    for side in ("light", "dark"):
        first, *_, last = colors(SIGN, side)
        assert int(first[5:], 16) - int(last[5:], 16) > 50


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: scale.name)
def test_steps_of_values(scale: Scale) -> None:
    assert scale.step(scale.low) == scale.step(scale.low - 9) == 0
    assert scale.step(scale.high) == scale.step(scale.high + 9) == scale.steps - 1
    assert scale.step((scale.low + scale.high) / 2) == (scale.steps - 1) // 2
    assert len(set(scale.colors(scale.light))) == scale.steps
    assert (colors(scale, "light")[0], colors(scale, "light")[-1]) == (scale.light[0], scale.light[-1])


def test_the_style_has_every_color_in_both_themes() -> None:
    light, dark = render_colors().split("@media screen and (prefers-color-scheme:dark)")
    for part, theme, side in ((light, LIGHT, "light"), (dark, DARK, "dark")):
        assert f"--text:{theme.text}" in part
        for scale in SCALES:
            found = re.findall(rf"\.{scale.name}-\d+{{background:(#\w+);color:(#\w+)}}", part)
            assert found == [(color, ink_on(color)) for color in colors(scale, side)]
