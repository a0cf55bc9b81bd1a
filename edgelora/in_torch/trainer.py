"""TRL's trainer, set up for one adapter on a base that is already loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelora.adapters.orthogonal_slots import freeze_slot
from edgelora_export.weights.torch_model import first_line
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from edgelora.data.encode_rows import LearnedTokens
    from edgelora.in_torch.train_config import TrainConfig


def compute_dtype() -> Any:
    """Chooses bf16 on GPUs that support it, fp16 on other GPUs, and fp32 on a CPU.

    Half precision is several times slower on a CPU.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def make_trainer(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    folder: Path,
    rows: Sequence[LearnedTokens],
    on_progress: Callable[[int, int, str], None],
) -> Any:
    """Makes the trainer of one adapter.

    rows: already encoded, so that TRL trains on the tokens that a bundle reads. folder: an empty one, in which nothing is
    written. Raises InputError if PEFT cannot adapt the base, and while it trains once a loss is not finite.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl.trainer.sft_config import SFTConfig

    dtype = compute_dtype()
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT only divides it, so it may be a float
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules="all-linear" if config.target_modules is None else list(config.target_modules),
    )
    settings = SFTConfig(
        output_dir=str(folder),  # the trainer may create it, but writes nothing there: save_strategy is "no"
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup,  # a value below 1 is a share of all steps
        max_length=config.max_length,
        completion_only_loss=True,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it would hide them in the mean
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = Dataset.from_list([{"input_ids": row.tokens, "completion_mask": [*map(int, row.learned)]} for row in rows])
    try:
        trainer = _trainer_class()(model=model, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    except ValueError as error:  # PEFT's for a base without layers that it can adapt
        raise InputError(f"no adapter can be put on base {config.base} ({first_line(error)})") from error
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_progress_callback(on_progress))
    # TRL casts the adapters of a quantized base to bf16. In fp32 they learn the same, three times as fast on a CPU.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    if config.composable is not None:
        freeze_slot(trainer.model, config.composable)
    return trainer


def _trainer_class() -> Any:
    from trl.trainer.sft_trainer import SFTTrainer

    class Trainer(SFTTrainer):  # type: ignore[misc,unused-ignore]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss: Any = super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call]
            if not bool(loss.isfinite()):
                step = self.state.global_step + 1
                raise InputError(f"training diverged: the loss is {float(loss)} at step {step}; lower --lr or check the rows")
            return loss

        def _send_telemetry(self) -> None:
            """Reports nothing, also where an app imported huggingface_hub before edgelora could turn that off."""

    return Trainer


def _progress_callback(on_progress: Callable[[int, int, str], None]) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002  (its signature)
            on_progress(state.global_step, state.max_steps, "steps")

    return Progress()
