"""The demo's results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Switch:
    """Times of two switches to a variant, in milliseconds.

    first: creates its session. back: returns to it after others.
    """

    variant: str
    first: float
    back: float


@dataclass(frozen=True)
class DemoReport:
    """The demo's results.

    Scores are shares from 0 to 1, on test rows that no choice was made on.
    torch: each task's score with its adapter in PEFT, on the base of its training. scores: per variant and task, in onnxruntime.
    written: number of answers by each adapter that the mix was learned from. kept: the mix's score on each task, as a share of
    the single adapter's. seconds: per stage.
    """

    bundle: Path
    test_rows: Mapping[str, int]
    metrics: Mapping[str, str]
    torch: Mapping[str, float]
    scores: Mapping[str, Mapping[str, float]]
    written: int
    kept: Mapping[str, float]
    switches: Sequence[Switch]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class RealDemoReport:
    """The results of the demo on a real model.

    kinds: merged or live, by variant. kept: the share of its adapters' effect that survived quantization, as the gate measured
    it, by measured variant. None for the bare base. test_rows: per task, that no adapter saw. right: how many of these a variant
    answers to the letter, by variant and task. answers: by question and variant. seconds: per stage of this run, without those
    that an earlier one had done.
    """

    bundle: Path
    kinds: Mapping[str, str]
    kept: Mapping[str, float | None]
    test_rows: Mapping[str, int]
    right: Mapping[str, Mapping[str, int]]
    answers: Mapping[str, Mapping[str, str]]
    switches: Sequence[Switch]
    seconds: Mapping[str, float]
