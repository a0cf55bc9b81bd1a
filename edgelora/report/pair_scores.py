"""Scores mixes of two adapters on both tasks, against the base and single adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora.data.scores import slot_f1
from edgelora.mix.mix import Mix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgelora.adapters.folder import Adapter
    from edgelora.data.rows import Row
    from edgelora.in_torch.mixed_model import MixedModel

Try = tuple[str, tuple[float, float]]  # a method, and the weights of both adapters
KEPT = 0.8  # least share of an adapter's gain over the base that a mix must keep; the gate of export asks for the same
EXCESS = 0.1  # most nats per token above the adapter's own loss, for tasks without a score; docs/log.md has the figures


@dataclass(frozen=True)
class TaskScore:
    """Scores on one task.

    loss: nats per token of the reference completions. slot_f1: of greedy completions, None if the references are not slots.
    """

    loss: float
    slot_f1: float | None


@dataclass(frozen=True)
class MixScore:
    """A mix on one task.

    kept_loss, kept_score: (mix - base) / (adapter - base), None if the adapter gains nothing over the base. excess: nats per
    token above the adapter's own loss. kept: kept_score if there is one, else kept_loss.
    """

    loss: float
    slot_f1: float | None
    kept_loss: float | None
    kept_score: float | None
    excess: float
    kept: float | None

    @property
    def holds(self) -> bool:
        """True if the mix does the task well enough to replace its adapter.

        The loss by itself flatters a mix: most of what an adapter gains over a base that does not know the format is the format.
        """
        if self.kept_score is not None:
            return self.kept_score >= KEPT
        return self.excess <= EXCESS and (self.kept_loss is None or self.kept_loss >= KEPT)


@dataclass(frozen=True)
class PairScore:
    """The best mix of two adapters.

    weights: by adapter. tasks: by task. tried: how many were compared, on the same rows. method: a name in MIX_METHODS.
    """

    weights: Mapping[str, float]
    tasks: Mapping[str, MixScore]
    tried: int
    method: str = "linear"


@dataclass(frozen=True)
class PairScorer:
    """A base in torch, with the rows and scores that mixes are compared on.

    tasks: the rows of each adapter's task. base, alone: the scores of the base and of each single adapter, on all tasks.
    """

    model: MixedModel
    adapters: Mapping[str, Adapter]
    tasks: Mapping[str, Sequence[Row]]
    base: Mapping[str, TaskScore]
    alone: Mapping[str, Mapping[str, TaskScore]]

    @classmethod
    def open(
        cls,
        base: str,
        adapters: Mapping[str, Adapter],
        tasks: Mapping[str, Sequence[Row]],
        on_step: Callable[[str], None] = lambda what: None,
    ) -> PairScorer:
        """Loads a base and scores it, then each single adapter. Calls on_step before each."""
        from edgelora.in_torch.mixed_model import MixedModel

        on_step("base")
        model = MixedModel.open(base)
        bare = _score(model, tasks)
        alone = {}
        for name in adapters:
            on_step(name)
            model.set_mix(Mix(adapters, {name: 1.0}))
            alone[name] = _score(model, tasks)
        model.set_mix(None)
        return cls(model, adapters, tasks, bare, alone)

    def score_pair(
        self, pair: tuple[str, str], tries: Sequence[Try], on_step: Callable[[str], None] = lambda what: None
    ) -> PairScore:
        """Scores the best mix of two adapters.

        Of the mixes to try, it has the least excess on the worse task.
        """
        tasks = {name: self.tasks[name] for name in pair}
        losses = []
        for each in tries:
            on_step(" + ".join(pair))
            self._set(pair, each)
            losses.append({name: self.model.loss(rows) for name, rows in tasks.items()})
        excess = [max(found[name] - self.alone[name][name].loss for name in pair) for found in losses]
        best = excess.index(min(excess))
        self._set(pair, tries[best])
        scores = {
            name: rate_mix(TaskScore(losses[best][name], _score_slots(self.model, rows)), self.base[name], self.alone[name][name])
            for name, rows in tasks.items()
        }
        self.model.set_mix(None)
        method, weights = tries[best]
        return PairScore(dict(zip(pair, weights, strict=True)), scores, len(tries), method)

    def _set(self, pair: tuple[str, str], each: Try) -> None:
        method, weights = each
        self.model.set_mix(Mix(self.adapters, dict(zip(pair, weights, strict=True)), method))


def rate_mix(mix: TaskScore, base: TaskScore, alone: TaskScore) -> MixScore:
    """Rates a mix by the scores of the base and of the single adapter."""
    by_loss = _kept(mix.loss, base.loss, alone.loss, better=base.loss - alone.loss)
    by_score = None
    if mix.slot_f1 is not None and base.slot_f1 is not None and alone.slot_f1 is not None:
        by_score = _kept(mix.slot_f1, base.slot_f1, alone.slot_f1, better=alone.slot_f1 - base.slot_f1)
    kept = by_loss if by_score is None else by_score
    return MixScore(mix.loss, mix.slot_f1, by_loss, by_score, mix.loss - alone.loss, kept)


def _kept(mix: float, base: float, alone: float, *, better: float) -> float | None:
    return (mix - base) / (alone - base) if better > 0 else None


def _score(model: MixedModel, tasks: Mapping[str, Sequence[Row]]) -> dict[str, TaskScore]:
    return {name: TaskScore(model.loss(rows), _score_slots(model, rows)) for name, rows in tasks.items()}


def _score_slots(model: MixedModel, rows: Sequence[Row]) -> float | None:
    """Scores slot F1 of the model's greedy completions.

    Returns None, without running it, if the references are not slots.
    """
    references = [row.completion for row in rows]
    return None if slot_f1(references, references) is None else slot_f1(model.write(rows), references)
