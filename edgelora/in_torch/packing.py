"""Packs short rows into sequences, so that a batch holds little padding and no row attends to another one."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgelora.data.encode_rows import LearnedTokens

_TRIAL = (5, 7)  # lengths of the rows with which check_packing tries a model
_TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}  # of a logit, relative to the largest


@dataclass(frozen=True)
class PackedRows:
    """Rows one after another in one sequence.

    tokens: their token ids. learned: for each token, whether its loss counts. lengths: the tokens of each row, in order.
    """

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]
    lengths: tuple[int, ...]

    def to_columns(self) -> dict[str, list[int]]:
        """Returns the columns that TRL's trainer and PackedCollator read."""
        return {
            "input_ids": [*self.tokens],
            "completion_mask": [*map(int, self.learned)],
            "seq_lengths": [*self.lengths],
        }


def pack_rows(rows: Sequence[LearnedTokens], length: int) -> list[PackedRows]:
    """Packs rows into as few sequences of at most `length` tokens as best-fit decreasing finds.

    Each row goes, the longest first, into the fullest sequence that has room for it, as in TRL's strategy "bfd". The first token
    of a row carries no loss: nothing predicts it. Raises InputError for a row that is longer.
    """
    sequences: list[list[LearnedTokens]] = []
    rooms: list[tuple[int, int]] = []  # the room of each sequence and its number, in ascending order
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        size = len(row.tokens)
        if size > length:
            raise InputError(f"a row of {size} tokens does not fit into sequences of {length}; cut it first")
        place = bisect.bisect_left(rooms, (size, -1))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = length, len(sequences)
            sequences.append([])
        sequences[number].append(row)
        bisect.insort(rooms, (room - size, number))
    return [_join(sequence) for sequence in sequences]


class PackedCollator:
    """Collates packed sequences into a batch in which transformers keeps the rows apart.

    The positions start at 0 with each row, and there is no attention mask: from this, and with use_cache off, transformers makes
    a mask in which rows do not see each other (masking_utils.find_packed_sequence_indices). TRL's trainer turns use_cache off.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, sequences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns input_ids, labels (-100 where no loss counts) and position_ids, each int64 (B, T).

        sequences: with input_ids, seq_lengths, and either labels or completion_mask. The padding at a sequence's end counts as
        one more row without loss.
        """
        import torch

        widest = max(len(sequence["input_ids"]) for sequence in sequences)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for sequence in sequences:
            tokens, lengths = sequence["input_ids"], sequence["seq_lengths"]
            missing = widest - len(tokens)
            labels = sequence.get("labels") or [
                token if learned else -100 for token, learned in zip(tokens, sequence["completion_mask"], strict=True)
            ]
            positions = [*chain.from_iterable(map(range, [*lengths, missing]))]
            labels = [*labels, *[-100] * missing]
            batch["input_ids"].append([*tokens, *[self.pad_token_id] * missing])
            batch["labels"].append([-100 if place == 0 else label for place, label in zip(positions, labels, strict=True)])
            batch["position_ids"].append(positions)
        return {name: torch.tensor(values) for name, values in batch.items()}


def check_packing(model: Any) -> None:
    """Raises InputError if rows that are packed see each other in a model, as where its layers carry a state along.

    Two short rows run packed and apart, and their logits are compared. model: of transformers, a causal language model.
    """
    import torch

    ids = (torch.arange(sum(_TRIAL)) % min(97, model.config.get_text_config().vocab_size))[None].to(model.device)
    positions = torch.cat([torch.arange(length) for length in _TRIAL])[None].to(model.device)
    was_training = model.training
    model.eval()  # without dropout
    try:
        with torch.no_grad():
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, _TRIAL[0] :].float()
            apart = model(input_ids=ids[:, _TRIAL[0] :], use_cache=False).logits[0].float()
    finally:
        model.train(was_training)
    distance = float((packed - apart).abs().max() / apart.abs().max())
    dtype = str(next(parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point))
    if not distance <= _TOLERANCES.get(dtype.removeprefix("torch."), max(_TOLERANCES.values())):
        raise InputError(
            f"rows that are packed would see each other in this base ({type(model).__name__}): a logit moves by {distance:.1%}; "
            "train without packing"
        )


def _join(rows: Sequence[LearnedTokens]) -> PackedRows:
    lengths = tuple(len(row.tokens) for row in rows)
    tokens = tuple(chain.from_iterable(row.tokens for row in rows))
    learned = tuple(chain.from_iterable((False, *row.learned[1:]) for row in rows))
    return PackedRows(tokens, learned, lengths)
