"""The optimizers of a training run: their names in transformers, and LoRA+."""

from __future__ import annotations

from typing import Any

# Names of settings and what transformers calls them (OptimizerNames in training_args.py).
NAMES = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion": "lion_32bit",
    "paged_lion_8bit": "paged_lion_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}


def describe_fallback(name: str) -> str | None:
    """Returns a line for the user if an optimizer works in another way on this machine."""
    import torch

    if not name.startswith("paged") or torch.cuda.is_available():
        return None
    return f"optimizer {name}: bitsandbytes pages on GPUs alone, so here its state stays in memory"


def make_lora_plus(model: Any, arguments: Any, ratio: float) -> Any:
    """Makes the optimizer that transformers' arguments ask for, with B's learning rate `ratio` times A's (arXiv 2402.12354)."""
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    return create_loraplus_optimizer(
        model,
        kind,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=arguments.weight_decay,
        loraplus_lr_embedding=arguments.learning_rate,
        **settings,
    )
