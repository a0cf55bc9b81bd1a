"""Counts the progress of an export in steps of one layer, over all passes to come, so that the time left can be estimated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    OnProgress = Callable[[int, int, str], None]

GPTQ_COST = 6  # of a layer quantized by GPTQ, in layers that are run or rounded. Exact enough for a progress bar


@dataclass
class Progress:
    """The progress of an export. on_progress(done, total, what) is called before each step. layers: of the model."""

    on_progress: OnProgress
    layers: int
    total: int = 0
    done: int = 0

    def expect(self, passes: int, cost: int = 1) -> None:
        """Adds passes through all layers to the total. cost: steps that each layer counts for."""
        self.total += passes * self.layers * cost

    def start_pass(self, what: str, cost: int = 1) -> Callable[[int], None]:
        """Starts one of the expected passes. Returns the function to call with each layer's index."""

        def step(index: int) -> None:
            self.show(f"{what}, layer {index + 1} of {self.layers}")
            self.done = min(self.done + cost, self.total)

        return step

    def show(self, what: str) -> None:
        """Reports what is being done, without a step."""
        self.on_progress(self.done, max(self.total, 1), what)

    def finish(self, what: str) -> None:
        """Reports that all is done."""
        self.on_progress(self.total, self.total, what)
