"""Trains a LoRA adapter on a quantized base (QLoRA), with TRL's trainer and PEFT."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.adapters.folder import CONFIG, Provenance, write_provenance
from edgelora.adapters.orthogonal_slots import freeze_slot
from edgelora.data.row_tokens import encode_taught_row
from edgelora.data.rows import read_rows
from edgelora_export.base.base import Base
from edgelora_export.base.files import read_toml
from edgelora_export.base.tokenizer import load_tokenizer
from edgelora_export.quantize.int4 import quantize_rtn
from edgelora_export.weights.publish import staged_folder
from edgelora_export.weights.torch_model import quiet_libraries
from edgelora_runtime.errors import InputError, MissingExtraError, list_wrong

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgelora.data.rows import Row

QUANTS = ("nf4", "int4", "none")
_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run.

    base: folder or hub id. data: JSONL rows. The loss is on completions only. output: folder for the adapter.
    quant: how the base is held during training: nf4 (bitsandbytes, double-quantized, arXiv 2305.14314), int4 (the grid that
    export writes, so training sees the weights that ship) or none.
    rank, alpha: LoRA's (arXiv 2106.09685). rslora scales by alpha / √rank. target_modules: None for each linear layer except the
    head. epochs: passes over the data. max_steps overrides it. batch_size: rows per optimizer step. lr: peak learning rate,
    reached after warmup (a share of all steps), then decaying linearly to 0. max_length: in tokens. Longer rows are cut.
    gradient_checkpointing: recompute activations to save memory.
    composable: for adapters to be mixed: the slot of the shared basis that A is frozen to, a different one for each adapter (see
    adapters/orthogonal_slots.py). None trains A as well.
    """

    base: str
    data: Path
    output: Path
    quant: str = "nf4"
    rank: int = 16
    alpha: float = 32.0
    epochs: float = 1.0
    lr: float = 2e-4
    max_steps: int | None = None
    seed: int = 0
    batch_size: int = 16
    warmup: float = 0.05
    dropout: float = 0.0
    rslora: bool = False
    target_modules: tuple[str, ...] | None = None
    max_length: int = 1024
    gradient_checkpointing: bool = False
    composable: int | None = None

    def __post_init__(self) -> None:
        wrong = list_wrong(
            (
                ("quant", self.quant, self.quant in QUANTS, f"one of {', '.join(QUANTS)}"),
                ("rank", self.rank, self.rank >= 1, "1 or more"),
                ("alpha", self.alpha, self.alpha > 0, "more than 0"),
                ("epochs", self.epochs, self.epochs > 0, "more than 0"),
                ("lr", self.lr, self.lr > 0, "more than 0"),
                ("max_steps", self.max_steps, self.max_steps is None or self.max_steps >= 1, "1 or more"),
                ("seed", self.seed, 0 <= self.seed < 1 << 32, "0 to 2^32 - 1"),
                ("batch_size", self.batch_size, self.batch_size >= 1, "1 or more"),
                ("warmup", self.warmup, 0 <= self.warmup < 1, "a share, 0 or more and less than 1"),
                ("dropout", self.dropout, 0 <= self.dropout < 1, "a share, 0 or more and less than 1"),
                ("max_length", self.max_length, self.max_length >= 2, "2 or more"),
                ("composable", self.composable, self.composable is None or self.composable >= 0, "a slot, 0 or more"),
            )
        )
        if wrong:
            raise InputError("; ".join(wrong))


@dataclass(frozen=True)
class TrainReport:
    """The result of a training run.

    train_loss: mean over all steps, in nats per completion token. seconds: training only.
    """

    output: Path
    rows: int
    steps: int
    train_loss: float
    seconds: float
    base_sha256: str


def read_train_config(path: Path) -> dict[str, Any]:
    """Reads fields of TrainConfig from a TOML file. InputError lists unknown keys."""
    value = read_toml(path, "--config names it")
    known = [field.name for field in fields(TrainConfig)]
    if unknown := sorted(set(value) - set(known)):
        raise InputError(f"config {path}: {', '.join(unknown)} is not known; known: {', '.join(known)}")
    if "target_modules" in value:
        value["target_modules"] = tuple(value["target_modules"])
    return value


def train(config: TrainConfig, *, on_progress: Callable[[int, int, str], None] = lambda done, total, what: None) -> TrainReport:
    """Trains one adapter and writes it as a PEFT folder.

    The folder has fp16 factors and an edgelora.json.
    Computes in fp32 on a CPU, and in bf16 or fp16 on a GPU. Calls on_progress(done, total, "steps") after every step.
    Raises InputError for unusable data, base or output, and then leaves the output unchanged.
    """
    _require_packages()
    import datasets  # noqa: F401  (before quiet_libraries, which then silences its progress bars)

    rows = read_rows(config.data)
    base = Base.find(config.base)
    with staged_folder(config.output, marker=CONFIG) as folder, quiet_libraries(whole_process=False):
        trainer = _make_trainer(config, str(base.path), folder, rows, on_progress)
        started = time.perf_counter()
        result = trainer.train()
        seconds = time.perf_counter() - started
        _save_adapter(trainer.model, folder)
        provenance = Provenance(
            base_name=base.name,
            base_sha256=base.sha256,
            base_quantization=config.quant,
            data_sha256=hashlib.sha256(config.data.read_bytes()).hexdigest(),
            data_rows=len(rows),
            init="default" if config.composable is None else f"composable: slot {config.composable}",
            seed=config.seed,
            rank=config.rank,
            alpha=config.alpha,
            steps=int(result.global_step),
            learning_rate=config.lr,
            data_file=_relative(config.data, config.output),
        )
        write_provenance(folder, provenance)
    return TrainReport(config.output, len(rows), provenance.steps, float(result.training_loss), seconds, base.sha256)


def load_base(base: str, quant: str) -> tuple[Any, Any]:
    """Loads a base as training holds it, and its tokenizer.

    The base is on a GPU if there is one.
    """
    _require_packages()
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = compute_dtype()
    nf4 = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    device = {"": torch.cuda.current_device()} if torch.cuda.is_available() else {"": "cpu"}
    tokenizer = load_tokenizer(Base.find(base))
    try:
        with quiet_libraries(whole_process=False):
            model = AutoModelForCausalLM.from_pretrained(
                base, dtype=dtype, device_map=device, quantization_config=nf4 if quant == "nf4" else None
            )
    except (OSError, ValueError) as error:
        raise InputError(f"base {base} cannot be loaded ({str(error).splitlines()[0]})") from error
    if quant == "int4":
        _round_to_int4(model)
    return model, tokenizer


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingExtraError(", ".join(missing), "train")


def compute_dtype() -> Any:
    """Chooses bf16 on GPUs that support it, fp16 on other GPUs, and fp32 on a CPU.

    Half precision is several times slower on a CPU.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _make_trainer(
    config: TrainConfig, base: str, folder: Path, rows: list[Row], on_progress: Callable[[int, int, str], None]
) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, set_seed
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    set_seed(config.seed)
    model, tokenizer = load_base(base, config.quant)
    if tokenizer.eos_token is None:
        raise InputError(
            f"the tokenizer of {base} has no eos_token, so an adapter cannot learn to stop; set one in tokenizer_config.json"
        )
    taught = [encode_taught_row(tokenizer, row) for row in rows]
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
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer: Any = SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(taught), processing_class=tokenizer, peft_config=lora
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_progress_callback(on_progress))
    # TRL casts the adapters of a quantized base to bf16. In fp32 they learn the same, three times as fast on a CPU.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    if config.composable is not None:
        freeze_slot(trainer.model, config.composable)
    return trainer


def _progress_callback(on_progress: Callable[[int, int, str], None]) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002  (its signature)
            on_progress(state.global_step, state.max_steps, "steps")

    return Progress()


def _save_adapter(model: Any, folder: Path) -> None:
    """Writes PEFT's two files, with factors in fp16.

    Deletes PEFT's model card, which is an empty template.
    """
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_A" in name:  # lora_A is frozen in a composable adapter
            parameter.data = parameter.data.to(torch.float16)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def _round_to_int4(model: Any) -> None:
    """Rounds every linear weight and the embedding to export's grid, in place."""
    import torch
    from transformers.pytorch_utils import Conv1D

    embedding = model.get_input_embeddings()
    done: set[int] = set()  # a tied head shares the embedding's tensor
    for module in model.modules():
        linear = isinstance(module, torch.nn.Linear | Conv1D)
        if (linear or module is embedding) and module.weight.data_ptr() not in done:
            # Conv1D, GPT-2's linear layer, stores its weight as (K, N).
            weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
            weight.copy_(torch.from_numpy(quantize_rtn(weight.float().cpu().numpy()).dequantize()))
            done.add(module.weight.data_ptr())


def _relative(file: Path, folder: Path) -> str:
    """Returns a file's path relative to a folder.

    The path is absolute if there is no relative one, as between drives.
    """
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:
        return str(file.resolve())
