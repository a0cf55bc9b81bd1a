"""Progress of an export: steps of a layer each, counted over all that is to be done, so that the time left can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    OnProgress = Callable[[int, int, str], None]

COMPENSATED = 6  # what a layer quantized by GPTQ costs, in layers that are run or rounded: a bar needs no more exactness


@dataclass
class Progress:
    """on_progress(done, total, what) is called before each step. layers: of the model."""

    on_progress: OnProgress
    layers: int
    total: int = 0
    done: int = 0

    def expect(self, passes: int, cost: int = 1) -> None:
        """So many passes through all layers are ahead."""
        self.total += passes * self.layers * cost

    def through(self, what: str, cost: int = 1) -> Callable[[int], None]:
        """What to call with each layer's index in one of those passes."""

        def step(index: int) -> None:
            self.show(f"{what}, layer {index + 1} of {self.layers}")
            self.done = min(self.done + cost, self.total)

        return step

    def show(self, what: str) -> None:
        """Says what is being done, without a step."""
        self.on_progress(self.done, max(self.total, 1), what)

    def finish(self, what: str) -> None:
        """All is done."""
        self.on_progress(self.total, self.total, what)
