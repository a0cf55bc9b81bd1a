"""An adapter as PEFT and torch run it, on the base that it was trained on: what exported variants are measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelora.training import load_base, quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from edgelora.rows import Row

BATCH = 32  # prompts per generate() call


def write_with_torch(
    base: str,
    adapter: Path | None,
    rows: Sequence[Row],
    *,
    quant: str = "nf4",
    max_tokens: int = 64,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[str]:
    """The completions that PEFT's model writes greedily for the rows' prompts; the bare base's for no adapter."""
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig

    with quiet_libraries():
        model, tokenizer = load_base(base, quant)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad
    )
    written: list[str] = []
    with torch.inference_mode(), quiet_libraries():
        for start in range(0, len(rows), BATCH):
            on_progress(start, len(rows), "torch")
            prompts = [tokenizer(row.prompt)["input_ids"] for row in rows[start : start + BATCH]]
            width = max(map(len, prompts))
            ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
            answers = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            written += [tokenizer.decode(answer[width:], skip_special_tokens=True) for answer in answers]
    return written
