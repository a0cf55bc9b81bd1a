"""Scores adapters on rows, each on its own on one base in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora.adapters.folder import open_adapters
from edgelora.evaluation import Measures, Scores, check_rows, is_text, score_answers
from edgelora.in_torch.mixed_model import MixedModel, stack_adapters
from edgelora.in_torch.train import load_base
from edgelora.mix.mix import Mix
from edgelora_export.base.base import Base
from edgelora_export.weights.torch_model import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgelora.adapters.folder import Adapter
    from edgelora.data.rows import Row

BARE = "base"  # the name of a base without an adapter


def evaluate_adapters(
    base: str,
    adapters: Mapping[str, str],
    rows: Sequence[Row],
    *,
    quant: str = "none",
    max_tokens: int = 64,
    template_options: Mapping[str, Any] | None = None,
    measures: Measures | None = None,
    on_note: Callable[[str], None] = lambda note: None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Scores]:
    """Scores adapters, given as name → folder or file, or the bare base if there are none.

    quant: how the base is held, as in training: nf4, int4 or none. The other arguments are those of evaluation.evaluate, whose
    scores these are. With nf4 an adapter must be one of factors alone; without, its sum with the base is in float32.
    """
    check_rows(rows, measures)
    opened = open_adapters(dict(adapters), base=Base.find(base).config, on_note=on_note)
    model = _open_base(base, quant, template_options)
    if quant == "nf4":
        stacks = stack_adapters(opened, str(model.model.device)) if opened else {}
    asked = [row for row in rows if not is_text(row)]
    found: dict[str, Scores] = {}
    for done, name in enumerate(opened or [BARE]):
        on_progress(done, max(1, len(opened)), name)
        if opened and quant == "nf4":
            _choose_stack(model, stacks, list(opened), name)
        elif opened:
            model.set_mix(_alone(name, opened[name]))
        answers = iter(model.write(asked, max_tokens) if asked else [])
        written = [None if is_text(row) else next(answers) for row in rows]
        losses = [(float(nats), int(tokens)) for nats, tokens in model.losses(rows)]
        found[name] = score_answers(rows, written, losses, measures)
    on_progress(len(found), len(found), "")
    return found


def _open_base(base: str, quant: str, template_options: Mapping[str, Any] | None) -> MixedModel:
    if quant == "none":
        return MixedModel.open(base, template_options)
    with quiet_libraries(whole_process=False):
        return MixedModel(*load_base(Base.find(base), quant), template_options)


def _alone(name: str, adapter: Adapter) -> Mix:
    return Mix({name: adapter}, {name: 1.0})


def _choose_stack(model: MixedModel, stacks: Mapping[str, Any], names: Sequence[str], name: str) -> None:
    """Sets the weight of one adapter to 1, and those of the others to 0."""
    for stack in stacks.values():
        stack.weights.zero_()
        stack.weights[names.index(name)] = 1.0
    model.set_stacks(stacks)
