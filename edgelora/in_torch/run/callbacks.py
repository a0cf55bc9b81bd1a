"""The callback by which the trainer keeps the course of a run, and what it says after each step."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelora.in_torch.run.course import Course

_WINDOW = 10  # steps over which the speed is taken


def make_callback(course: Course) -> Any:
    """Makes the callback by which the trainer keeps a course."""
    from transformers import TrainerCallback

    speed = Speed()

    class Keeper(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002  (its signature)
            save, stop = course.end_step(state.global_step)
            last = state.global_step >= state.max_steps
            control.should_save = save and not last
            control.should_training_stop = control.should_training_stop or stop
            control.should_evaluate = control.should_evaluate or (last and course.config.validation is not None)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
            if logs and "loss" in logs:
                course.on_progress(state.global_step, state.max_steps, describe_step(logs, speed.measure(logs)))

        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
            if course.judge(state.log_history, model):
                control.should_training_stop = True

    return Keeper()


class Speed:
    """The tokens per second of the last steps, from the totals that the trainer logs."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=_WINDOW + 1)

    def measure(self, logs: Mapping[str, Any]) -> float | None:
        """Takes one step's log. Returns tokens per second, or None before the second step and without a total."""
        if "num_tokens" not in logs:
            return None
        self._seen.append((time.perf_counter(), logs["num_tokens"]))
        (start, before), (now, tokens) = self._seen[0], self._seen[-1]
        return (tokens - before) / (now - start) if now > start else None


def describe_step(logs: Mapping[str, Any], tokens_per_second: float | None) -> str:
    """Describes a step for a line of progress."""
    speed = "" if tokens_per_second is None else f", {tokens_per_second:.0f} tokens/s"
    return f"loss {logs['loss']:.3f}, lr {logs['learning_rate']:.1e}{speed}"
