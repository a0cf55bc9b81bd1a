"""Runs an adapter with PEFT and torch on the base of its training.

This is the reference for exported variants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora.adapters.provenance import read_provenance
from edgelora.data.encode_rows import RowEncoder
from edgelora.in_torch.merge_aware import hold_merged
from edgelora.in_torch.train import load_held_base
from edgelora_export.base.base import Base
from edgelora_export.base.tokenizer import load_tokenizer
from edgelora_export.texts.ends import find_end_tokens
from edgelora_export.weights.torch_model import quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from edgelora.data.rows import Row

BATCH_SIZE = 32  # prompts per generate() call


def write_with_torch(
    base: str,
    adapter: Path | None,
    rows: Sequence[Row],
    *,
    quant: str = "nf4",
    max_tokens: int = 64,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[str]:
    """Completes the rows' prompts by greedy decoding with an adapter in PEFT.

    adapter: None for the bare base. quant: how to hold the base, unless the adapter is merge-aware: its merged weights are int4.
    """
    found = Base.find(base)
    with quiet_libraries(whole_process=False):
        tokenizer = load_tokenizer(found)
        model = load_held_base(found, quant).eval() if adapter is None else load_adapted(found, adapter, quant)
        return write_completions(model, RowEncoder(tokenizer), rows, max_tokens, on_progress)


def load_adapted(base: Base, adapter: Path, quant: str) -> Any:
    """Loads an adapter in PEFT as it was trained. quant: how to hold the base, unless the adapter is merge-aware."""
    provenance = read_provenance(adapter)
    if provenance is not None and provenance.merge_aware:
        return load_merged(base, adapter)
    return _put_on(load_held_base(base, quant), adapter)


def load_merged(base: Base, adapter: Path, *, trainable: bool = False) -> Any:
    """Loads an adapter in PEFT with a merge-aware forward pass, however it was trained."""
    model = _put_on(load_held_base(base, "int4", merge_aware=True), adapter, trainable=trainable)
    hold_merged(model, base.config)
    return model


def _put_on(model: Any, adapter: Path, *, trainable: bool = False) -> Any:
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    return adapted.eval()


def write_completions(
    model: Any,
    encoder: RowEncoder,
    rows: Sequence[Row],
    max_tokens: int,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[str]:
    """Completes the rows' prompts by greedy decoding with a transformers model.

    Batches hold prompts of similar length.
    """
    import torch
    from transformers import GenerationConfig

    configs = [model.generation_config.to_dict(), model.config.to_dict()]
    tokenizer = encoder.tokenizer
    ends = list(find_end_tokens(tokenizer, configs, model.config.vocab_size))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)  # masked, so any token does
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=pad
    )
    encoded = [encoder(row.prompt) for row in rows]
    order = sorted(range(len(rows)), key=lambda place: len(encoded[place]))
    written = [""] * len(rows)
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH_SIZE):
            on_progress(start, len(rows), "torch")
            places = order[start : start + BATCH_SIZE]
            prompts = [encoded[place] for place in places]
            width = max(map(len, prompts))
            ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
            answers = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            for place, answer in zip(places, answers, strict=True):
                written[place] = tokenizer.decode(answer[width:], skip_special_tokens=True)
    return written
