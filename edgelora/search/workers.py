"""Scores trials in this process, or on Ray workers that each hold the base."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgelora.adapters.folder import find_template_options, open_adapters
from edgelora.data.scores import count_scores
from edgelora.mix.mix import Mix
from edgelora_export.base.base import Base
from edgelora_export.weights.torch_model import first_line
from edgelora_runtime.errors import EdgeloraError, InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora.data.rows import Row
    from edgelora.search.space import Point

    Figures = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Job:
    """The inputs that a worker needs to score points.

    rows: by split (searched, confirmed) and task. For the rest see SearchConfig.
    """

    base: str
    adapters: Mapping[str, Path]
    rows: Mapping[str, Mapping[str, Sequence[Row]]]
    objective: str
    max_tokens: int
    template_options: Mapping[str, Any] = field(default_factory=dict)


class Scorer:
    """Scores points one at a time on a base in memory."""

    def __init__(self, job: Job) -> None:
        from edgelora.in_torch.mixed_model import MixedModel

        self._job = job
        self._adapters = open_adapters(job.adapters, base=Base.find(job.base).config)
        self._model = MixedModel.open(job.base, find_template_options(self._adapters, job.template_options))

    def score(self, number: int, point: Point, split: str) -> tuple[int, Figures]:
        """Scores one point, and returns its number and figures.

        Figures are per task and row a numerator and a denominator, float64 (rows, 2), such as nats and tokens.
        """
        self._model.set_mix(Mix(self._adapters, point.weights, point.method, **point.settings))
        found = {}
        for task, rows in self._job.rows[split].items():
            if self._job.objective == "loss":
                found[task] = self._model.losses(rows)
            else:
                written = self._model.write(rows, self._job.max_tokens)
                found[task] = np.array(count_scores(written, [row.completion for row in rows]), np.float64)
        return number, found


class Workers(Protocol):
    """Scores numbered points on one split's rows. Results come in any order."""

    def score(self, points: Mapping[int, Point], split: str) -> Iterator[tuple[int, Figures]]: ...


class LocalWorkers:
    """Scores points one after another in this process."""

    def __init__(self, job: Job) -> None:
        self._scorer = Scorer(job)

    def score(self, points: Mapping[int, Point], split: str) -> Iterator[tuple[int, Figures]]:
        for number, point in points.items():
            yield self._scorer.score(number, point, split)


class RayWorkers:
    """Scores several points at a time, each on a Ray actor."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)

    def score(self, points: Mapping[int, Point], split: str) -> Iterator[tuple[int, Figures]]:
        import ray
        from ray.util import ActorPool

        pool: Any = ActorPool(self._actors)
        try:
            yield from pool.map_unordered(lambda actor, item: actor.score.remote(*item, split), list(points.items()))
        except ray.exceptions.RayTaskError as error:
            raise (
                error.cause
                if isinstance(error.cause, EdgeloraError)
                else InputError(f"a trial failed on Ray ({first_line(error.cause)}); run again to continue")
            ) from error
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]  # Ray's own status comes first
            raise InputError(f"Ray lost a worker ({reason}); run again to continue") from error


@contextmanager
def open_workers(job: Job, parallel: int, address: str | None) -> Iterator[Workers]:
    """Opens workers for a job.

    address: None for this process, local to start a Ray instance, auto or an address for a running cluster. Its machines need
    edgelora, and base and adapters under the same paths. Raises MissingExtraError without Ray, and InputError if no cluster
    answers.
    """
    if address is None:
        yield LocalWorkers(job)
        return
    if find_spec("ray") is None:
        raise MissingExtraError("ray", "ray")
    import ray

    own: Any = {}
    if address == "local":
        own["include_dashboard"] = False
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise Ray reports every start to its makers
    try:
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except Exception as error:  # Ray raises many types, plain Exception among them
            raise InputError(
                f"no Ray cluster at {address} ({first_line(error)}); give auto, local, or a cluster's address"
            ) from error
        nodes: Any = ray.nodes()  # type: ignore[no-untyped-call]
        count, share = plan_workers([node["Resources"] for node in nodes if node["Alive"]], parallel)
        actor: Any = ray.remote(Scorer)
        yield RayWorkers([actor.options(**share).remote(job) for _ in range(count)])
    finally:
        ray.shutdown()


def plan_workers(machines: Sequence[Mapping[str, float]], parallel: int) -> tuple[int, dict[str, int]]:
    """Chooses the number of workers, at most `parallel`, and the resources of each.

    Each gets a GPU if there are any, else cores. A worker that asks for more than any machine has would wait forever, and so
    would a worker beyond the cluster's capacity.
    """
    if gpus := sum(int(machine.get("GPU", 0)) for machine in machines):
        return min(parallel, gpus), {"num_cpus": 1, "num_gpus": 1}
    cores = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    if not cores:
        raise InputError("Ray has no CPU cores; start it with at least one")
    each = max(1, min(*cores, sum(cores) // parallel))
    return min(parallel, sum(count // each for count in cores)), {"num_cpus": each}
