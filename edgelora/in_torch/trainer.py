"""TRL's trainer, set up for one adapter on a base that is already loaded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.in_torch import preferences
from edgelora.in_torch.adapter_start import add_adapter, list_own, set_start
from edgelora.in_torch.packing import PackedCollator, PackedRows, check_packing
from edgelora.in_torch.run import checkpoints, optimizers
from edgelora.in_torch.run.callbacks import make_callback
from edgelora.in_torch.run.processes import count_processes, is_first_process
from edgelora_runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgelora.in_torch.run.course import Course
    from edgelora.in_torch.train_config import TrainConfig
    from edgelora_export.base.base import Base

_SCHEDULES = {"constant": "constant_with_warmup"}  # transformers' names, where they differ from ours


@dataclass(frozen=True)
class Examples:
    """The encoded rows of a run: those to learn and those to validate on. See encode_rows.LearnedTokens, preferences.Pair."""

    learn: Sequence[Any]
    validate: Sequence[Any] = ()


def compute_dtype() -> Any:
    """Chooses bf16 on GPUs that support it, fp16 on other GPUs, and fp32 on a CPU.

    Half precision is several times slower on a CPU.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def make_trainer(config: TrainConfig, base: Base, model: Any, tokenizer: Any, examples: Examples, course: Course) -> Any:
    """Makes the trainer of one adapter.

    model: the base as training holds it. examples: already encoded, so that TRL trains on the tokens that a bundle reads. Raises
    InputError if PEFT cannot adapt the base, and while it trains once a loss is not finite.
    """
    import torch
    from transformers import PrinterCallback

    adapted = add_adapter(config, model)
    first_values = checkpoints.take_weights(adapted)
    if config.packing:
        check_packing(adapted)
    make = partial(preferences.make_trainer, beta=config.beta) if config.preferences else _make_supervised
    trainer = make(_extend(course), adapted, tokenizer, examples, _make_arguments(config, course))
    # TRL casts the adapters of a quantized base to bf16. In fp32 they learn the same, three times as fast on a CPU.
    for _, parameter in list_own(trainer.model):
        parameter.data = parameter.data.to(torch.float32)
    checkpoints.put_weights(trainer.model, first_values)
    if course.resume is None or config.composable is not None or config.start == "eva":  # EVA also sets PEFT's config
        set_start(config, trainer.model, base, trainer.get_train_dataloader())
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(make_callback(course))
    if "tensorboard" in (config.report_to or ()) and is_first_process():
        trainer.add_callback(_make_tensorboard(config.output))
    return trainer


def check_run(config: TrainConfig) -> None:
    """Raises UsageError for settings that do not fit the processes and packages at hand."""
    parts = config.accumulation * count_processes()
    if config.batch_size % parts:
        raise UsageError(
            f"batch_size = {config.batch_size} is not a multiple of accumulation × processes = {parts}; change one of them"
        )
    if missing := [name for name in config.report_to or () if find_spec(name) is None]:
        raise UsageError(f"report_to = {', '.join(missing)}: not installed; run: pip install {' '.join(missing)}")


def _make_arguments(config: TrainConfig, course: Course) -> dict[str, Any]:
    """Returns the arguments that transformers' trainer and TRL's share."""
    import torch

    dtype, validates = compute_dtype(), config.validation is not None
    return {
        "output_dir": str(course.work),  # only TRL's own reports would be written there, and they are off
        "run_name": config.output.name,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.batch_size // (config.accumulation * count_processes()),
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.lr,
        "lr_scheduler_type": _SCHEDULES.get(config.schedule, config.schedule),
        "warmup_steps": config.warmup,  # a value below 1 is a share of all steps
        "optim": optimizers.NAMES[config.optimizer],
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "neftune_noise_alpha": config.neftune,
        "max_length": config.max_length,
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not torch.cuda.is_available(),
        "ddp_backend": "gloo" if count_processes() > 1 and not torch.cuda.is_available() else None,
        "seed": config.seed,
        "data_seed": config.seed,
        "eval_strategy": "steps" if validates else "no",
        "eval_steps": config.validate_every or 0.1,  # a value below 1 is a share of all steps
        "eval_on_start": validates and course.resume is None,
        "per_device_eval_batch_size": config.batch_size // (config.accumulation * count_processes()),
        "save_strategy": "no",  # the callback decides
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would hide them in the mean
        "report_to": [name for name in config.report_to or () if name != "tensorboard"],
        "project": "edgelora",
        "trackio_static_space_id": False,  # nothing is published
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _make_supervised(extend: Any, model: Any, tokenizer: Any, examples: Examples, arguments: dict[str, Any]) -> Any:
    """Makes the trainer of completions."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    def tabulate(rows: Sequence[Any]) -> Any:
        if packed:
            return Dataset.from_list([row.to_columns() for row in rows])
        return Dataset.from_list([{"input_ids": row.tokens, "completion_mask": [*map(int, row.learned)]} for row in rows])

    packed = isinstance(examples.learn[0], PackedRows)
    return extend(SFTTrainer)(
        model=model,
        args=SFTConfig(completion_only_loss=True, **arguments),
        train_dataset=tabulate(examples.learn),
        eval_dataset=tabulate(examples.validate) if examples.validate else None,
        processing_class=tokenizer,
        data_collator=PackedCollator(tokenizer.eos_token_id) if packed else None,
    )


def _extend(course: Course) -> Any:
    """Returns a function that extends one of TRL's trainers by this run's checkpoints, optimizer and checks."""

    def extend(parent: Any) -> Any:
        class Trainer(parent):  # type: ignore[misc,unused-ignore]
            optimizer: Any

            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                inputs = args[1]
                if "attention_mask" not in inputs:  # TRL counts packed sequences as if there were one
                    rows, length = inputs["input_ids"].shape
                    self._total_train_tokens += (rows - 1) * length * count_processes()
                loss: Any = super().training_step(*args, **kwargs)
                if not bool(loss.isfinite()):
                    step = self.state.global_step + 1
                    raise InputError(f"training diverged: the loss is {float(loss)} at step {step}; lower --lr or check the rows")
                return loss

            def create_optimizer(self, model: Any = None) -> Any:
                if self.optimizer is None and course.config.lora_plus is not None:
                    self.optimizer = optimizers.make_lora_plus(self.model, self.args, course.config.lora_plus)
                return super().create_optimizer(model)

            def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
                if start_time is not None:
                    logs["seconds"] = time.time() - start_time
                super().log(logs, start_time)

            def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ARG002  (its signature)
                first, step = self.args.process_index == 0, self.state.global_step
                with checkpoints.staged_checkpoint(course.checkpoints, step, course.description, first=first) as folder:
                    self.accelerator.wait_for_everyone()
                    if first:
                        checkpoints.save_model_weights(self.model, folder)
                        self.state.save_to_json(str(folder / "trainer_state.json"))
                        if course.best is not None:
                            checkpoints.save_weights(course.best, folder / checkpoints.BEST)
                    self._save_optimizer_and_scheduler(str(folder))
                    self._save_scaler(str(folder))
                    self._save_rng_state(str(folder))
                    self.accelerator.wait_for_everyone()

            def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
                folder = Path(resume_from_checkpoint)
                checkpoints.load_model_weights(self.model, folder)
                if (folder / checkpoints.BEST).is_file():
                    course.best = checkpoints.load_weights(folder / checkpoints.BEST)

            def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
                found = super()._init_training_state(*args, **kwargs)
                counts = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
                self._total_train_tokens = max(counts, default=0)
                return found

            def _send_telemetry(self) -> None:
                """Reports nothing, also where an app imported huggingface_hub before edgelora could turn that off."""

        return Trainer

    return extend


def _make_tensorboard(output: Path) -> Any:
    """Makes the callback that writes TensorBoard's files to OUTPUT.tensorboard, where they can be watched during the run."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    callback: Any = TensorBoardCallback
    writer: Any = SummaryWriter
    return callback(tb_writer=writer(str(output.with_name(f"{output.name}.tensorboard"))))
