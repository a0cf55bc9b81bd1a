"""Runs a search: tries mixes on held-out rows, and writes the best as an adapter.

It reports on other rows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.adapters.checks import check_factors, check_same_base, check_shapes
from edgelora.adapters.folder import open_adapters
from edgelora.composing.compose import compose
from edgelora.search.held_out import read_held_out
from edgelora.search.objective import Objective, sum_up
from edgelora.search.report import MixFigures, SearchReport, render_recipe
from edgelora.search.space import Point, choose_sampler, read_point
from edgelora.search.trial_log import Trial, TrialLog
from edgelora.search.trials import choose_best, run_trials
from edgelora.search.workers import Job, open_workers
from edgelora_export.architectures import native_types, read_decoder
from edgelora_export.base.base import Base
from edgelora_export.weights.publish import write_file
from edgelora_runtime.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgelora.adapters.folder import Adapter
    from edgelora.search.config import SearchConfig
    from edgelora.search.held_out import HeldOut

ADAPTER, REPORT = "adapter", "search.json"  # in the output folder, beside the trial log
_EXACT = 1e-6  # relative error up to which the written adapter counts as exactly the mix


def search(
    config: SearchConfig,
    *,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> SearchReport:
    """Tries mixes on held-out rows and writes the best one as an adapter.

    The report is on rows that no mix was chosen on. An interrupted run continues from its output folder, with the same trials as
    without the interruption. A run with a larger budget continues a smaller one. Raises InputError for data of a test split,
    adapters that do not fit, and an output folder that holds something else or the trials of another plan.
    """
    if missing := [name for name in ("optuna", "torch", "transformers") if find_spec(name) is None]:
        raise MissingExtraError(", ".join(missing), "search")
    base = Base.find(config.base)
    adapters = open_adapters(config.adapters, base=base.config, on_note=on_note)
    check_same_base(adapters, base.sha256)
    check_factors(adapters, "such a mix cannot be written as an adapter; search without it")
    if base.config.get("model_type") in native_types():
        check_shapes(adapters, read_decoder(base.config))
    for task in sorted(config.data.keys() - adapters.keys()):
        on_note(f"{task}: no adapter has that name; it is measured against the adapter that does best on it")
    held_out = read_held_out(config.data, adapters, config.confirm, on_note)
    trial_log = TrialLog(config.output, _make_plan(config, base, adapters, held_out))
    job = Job(
        base=str(Path(config.base).resolve()) if Path(config.base).exists() else config.base,
        adapters={name: Path(folder).resolve() for name, folder in config.adapters.items()},
        rows={
            "searched": {task: rows.searched for task, rows in held_out.items()},
            "confirmed": {task: rows.confirmed or rows.searched for task, rows in held_out.items()},
        },
        objective=config.objective,
        max_tokens=config.max_tokens,
        template_options=config.template_options,
    )
    before = dict(trial_log.trials)
    with open_workers(job, config.parallel, config.address) as workers:
        trials, objective = run_trials(config, trial_log, workers, on_progress)
        best, equal = choose_best(config, trials, objective)
        on_progress(len(trials), len(trials), "measuring for the report")
        reported = sorted({*range(len(adapters) + 1), best.number, equal.number})
        points = {number: read_point(config, trials[number].parameters) for number in reported}
        found = dict(workers.score(points, "confirmed"))
    figures = {number: sum_up(parts) for number, parts in found.items()}
    measured = replace(objective, base=figures[0])  # other rows, but shares stay relative to the adapters' changes in the search
    chosen = points[best.number]
    written = compose(
        {name: (folder, chosen.weights[name]) for name, folder in config.adapters.items()},
        config.output / ADAPTER,
        method=chosen.method,
        base=config.base,
        **chosen.settings,
    )

    def describe(trial: Trial) -> MixFigures:
        searched, kept = objective.kept(trial.quotients), measured.kept(figures[trial.number])
        return MixFigures(trial.number, points[trial.number], searched, kept, figures[trial.number])

    difference, low, high = measured.difference(found[best.number], found[equal.number], config.seed)
    report = SearchReport(
        output=config.output,
        adapter=written.output,
        objective=config.objective,
        configurations=len(trials),
        resumed=sum(before.get(trial.number) is trial for trial in trials),
        rows={task: (len(rows.searched), len(rows.confirmed)) for task, rows in held_out.items()},
        base=figures[0],
        adapters={name: figures[place] for place, name in enumerate(adapters, start=1)},
        equal=describe(equal),
        best=describe(best),
        difference=difference,
        interval=(low, high),
        rank=written.rank,
        largest_error=written.largest_error,
        written_kept=_measure_written(job, measured, written.output) if written.largest_error > _EXACT else None,
        recipe=render_recipe(config.adapters, chosen),
    )
    _write_report(config, trial_log, trials, objective, report)
    return report


def _make_plan(
    config: SearchConfig, base: Base, adapters: Mapping[str, Adapter], held_out: Mapping[str, HeldOut]
) -> dict[str, Any]:
    """Lists the settings that determine the trials.

    A trial log must match them to be continued. Budget and machines do not count.
    """
    return {
        "base": base.sha256,
        "adapters": {name: adapter.sha256 for name, adapter in adapters.items()},
        "data": {task: rows.sha256 for task, rows in held_out.items()},
        **{name: getattr(config, name) for name in ("methods", "weights", "density", "scale", "objective", "parallel", "seed")},
        "sampler": choose_sampler(config),
        "max_tokens": config.max_tokens if config.objective == "score" else None,
        **({"template_options": config.template_options} if config.template_options else {}),
    }


def _measure_written(job: Job, objective: Objective, adapter: Path) -> float:
    """Measures the share that the written adapter keeps.

    It differs from the mix's where the rank does not represent the mix exactly.
    """
    with open_workers(replace(job, adapters={"written": adapter}), 1, None) as workers:
        found = dict(workers.score({0: Point({"written": 1.0})}, "confirmed"))
    return objective.kept(sum_up(found[0]))


def _write_report(
    config: SearchConfig, trial_log: TrialLog, trials: Sequence[Trial], objective: Objective, report: SearchReport
) -> None:
    """Writes search.json: the report, the plan with its hashes, and every trial."""
    value = {
        "report": asdict(report),
        "budget": config.budget,
        "plan": trial_log.plan,
        "optuna": version("optuna"),
        "trials": [
            {
                "trial": trial.number,
                **asdict(read_point(config, trial.parameters)),
                "kept": objective.kept(trial.quotients),
                "figures": trial.quotients,
            }
            for trial in trials
        ],
    }
    write_file(config.output / REPORT, [(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n").encode()])
