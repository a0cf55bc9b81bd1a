"""Runs the trials of a search: initial points, then batches from the sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora.search.objective import Objective
from edgelora.search.space import is_within, list_initial_points, propose, read_point
from edgelora.search.trial_log import Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgelora.search.config import SearchConfig
    from edgelora.search.space import Parameters
    from edgelora.search.trial_log import TrialLog
    from edgelora.search.workers import Workers

    Progress = Callable[[int, int, str], None]


def run_trials(
    config: SearchConfig, trial_log: TrialLog, workers: Workers, on_progress: Progress
) -> tuple[list[Trial], Objective]:
    """Runs all trials up to the budget, and returns them in order.

    Trials in the log are not run again.
    """
    initial = list_initial_points(config)[: config.budget]
    trials = _run_batch(config, 0, initial, trial_log, workers, lambda done: on_progress(done, config.budget, "initial points"))
    base, *alone = (trial.quotients for trial in trials[: len(config.adapters) + 1])
    objective = Objective.read(base, dict(zip(config.adapters, alone, strict=True)), higher_is_better=config.objective == "score")
    while len(trials) < config.budget:
        tried = [(trial.parameters, objective.kept(trial.quotients)) for trial in trials]
        batch = propose(config, tried, config.parallel)[: config.budget - len(trials)]
        best = max(value for _, value in tried)

        def report_best(done: int, best: float = best) -> None:
            on_progress(done, config.budget, f"best keeps {best:.3f}")

        trials += _run_batch(config, len(trials), batch, trial_log, workers, report_best)
    return trials, objective


def choose_best(config: SearchConfig, trials: Sequence[Trial], objective: Objective) -> tuple[Trial, Trial]:
    """Finds the best mix that was tried, and the best one with equal weights.

    Ties go to the earlier trial. Single adapters count as mixes if the range of weights includes 0 and 1. The bare base does not
    count.
    """
    whole = config.weights[0] <= 0 and config.weights[1] >= 1
    alone = trials[1 : len(config.adapters) + 1] if whole else []
    mixes = [*alone, *(trial for trial in trials[len(config.adapters) + 1 :] if is_within(config, trial.parameters))]
    alike = [trial for trial in mixes if len({*read_point(config, trial.parameters).weights.values()}) == 1]
    best, equal = (max(some, key=lambda trial: objective.kept(trial.quotients)) for some in (mixes, alike))
    return best, equal


def _run_batch(
    config: SearchConfig,
    start: int,
    batch: Sequence[Parameters],
    trial_log: TrialLog,
    workers: Workers,
    on_done: Callable[[int], None],
) -> list[Trial]:
    """Scores points, numbered from `start`, and returns their trials in order.

    Points that the log holds are not scored again.
    """
    numbered = dict(enumerate(batch, start))
    known = {number for number in numbered if (found := trial_log.trials.get(number)) and found.parameters == numbered[number]}
    points = {number: read_point(config, point) for number, point in numbered.items() if number not in known}
    on_done(start + len(known))
    for done, (number, parts) in enumerate(workers.score(points, "searched"), start=start + len(known) + 1):
        # Six digits, so that rounding differences from threads and padding decide nothing.
        sums = {task: [float(f"{total:.6g}") for total in rows.sum(axis=0)] for task, rows in parts.items()}
        trial_log.add(Trial(number, numbered[number], {task: (above, below) for task, (above, below) in sums.items()}))
        on_done(done)
    return [trial_log.trials[number] for number in numbered]
