"""Preferences: rows of a prompt, a chosen and a rejected answer, and DPO on them with TRL's trainer (arXiv 2305.18290)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelora.data.records import parse_lines
from edgelora.data.rows import make_row, read_text
from edgelora_runtime.errors import InputError
from edgelora_runtime.session.kv_cache import shared_prefix

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgelora.data.encode_rows import RowEncoder
    from edgelora.data.rows import Row

FORM = '{"prompt": …, "chosen": …, "rejected": …}, with texts or lists of messages'


@dataclass(frozen=True)
class Preference:
    """One prompt with the answer that was preferred and the one that was not."""

    chosen: Row
    rejected: Row


@dataclass(frozen=True)
class Pair:
    """The token ids of a preference: of the prompt, and of each answer after it."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens that a step computes for this pair."""
        return (*self.prompt, *self.chosen, *self.prompt, *self.rejected)


def read_preferences(path: Path) -> list[Preference]:
    """Reads a JSONL file of preferences, skipping blank lines. InputError names the file and the first line that is not one."""
    found = [_read_preference(value, where) for value, where in parse_lines(read_text(path, "data file"), path)]
    if not found:
        raise InputError(f"data file {path} holds no rows; each line is {FORM}")
    return found


def _read_preference(value: object, where: str) -> Preference:
    if not isinstance(value, dict) or not {"prompt", "chosen", "rejected"} <= value.keys():
        raise InputError(f"{where} is no preference; each line is {FORM}")
    if value["chosen"] == value["rejected"]:
        raise InputError(f"{where}: chosen and rejected are the same; a preference needs two answers that differ")
    prompt, rows = value["prompt"], []
    for answer in ("chosen", "rejected"):
        completion = value[answer]
        if isinstance(prompt, list) and isinstance(completion, list) and completion[: len(prompt)] == prompt:
            completion = completion[len(prompt) :]  # some data sets repeat the prompt in both answers
        row = {"prompt": prompt, "completion": completion, **({"tools": value["tools"]} if "tools" in value else {})}
        rows.append(make_row(row, f"{where} {answer}"))
    return Preference(*rows)


def encode_preferences(encoder: RowEncoder, rows: Sequence[Preference], max_length: int) -> tuple[list[Pair], int]:
    """Encodes preferences with the tokens of a bundle. Also returns how many are cut to max_length.

    Both answers start after what they share of the prompt. A pair of which an answer is cut off altogether is left out. Raises
    InputError if none is left.
    """
    pairs, cut = [], 0
    for row in rows:
        chosen, rejected = encoder.learn(row.chosen), encoder.learn(row.rejected)
        start = min(chosen.learned.index(True), rejected.learned.index(True))
        start = min(start, shared_prefix(chosen.tokens, rejected.tokens))
        if start < max_length:
            cut += max(len(chosen.tokens), len(rejected.tokens)) > max_length
            kept = slice(start, max_length)
            pairs.append(Pair(chosen.tokens[:start], chosen.tokens[kept], rejected.tokens[kept]))
    if not pairs:
        raise InputError(f"no preference has a token of its answers among its first max_length = {max_length}; raise max_length")
    return pairs, cut


def make_trainer(extend: Any, model: Any, tokenizer: Any, examples: Any, arguments: dict[str, Any], *, beta: float) -> Any:
    """Makes TRL's trainer of preferences. The reference is the base, or the adapter as it was when a run goes on with one."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Trainer(extend(DPOTrainer)):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:  # noqa: ARG002  (its signature)
            return dataset  # the rows are tokens already

    def tabulate(pairs: Sequence[Pair]) -> Any:
        return Dataset.from_list(
            [
                {"prompt_ids": list(pair.prompt), "chosen_ids": list(pair.chosen), "rejected_ids": list(pair.rejected)}
                for pair in pairs
            ]
        )

    return Trainer(
        model=model,
        args=DPOConfig(beta=beta, **arguments),
        train_dataset=tabulate(examples.learn),
        eval_dataset=tabulate(examples.validate) if examples.validate else None,
        processing_class=tokenizer,
    )
