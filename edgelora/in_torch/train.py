"""Trains a LoRA adapter on a quantized base (QLoRA), with TRL's trainer and PEFT."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.adapters.folder import CONFIG, Provenance, write_provenance
from edgelora.data.calibration import hash_data
from edgelora.data.encode_rows import LearnedTokens, RowEncoder
from edgelora.data.rows import read_rows
from edgelora.in_torch.merge_aware import check_merge_aware, hold_merged
from edgelora.in_torch.save_adapter import check_factors, check_room, keep_adapter, save_adapter
from edgelora.in_torch.target_modules import check_targets
from edgelora.in_torch.trainer import compute_dtype, make_trainer
from edgelora_export.base.base import Base
from edgelora_export.base.tokenizer import load_tokenizer
from edgelora_export.quantize.int4 import quantize_rtn
from edgelora_export.weights.publish import staged_folder
from edgelora_export.weights.torch_model import first_line, load_model, quiet_libraries
from edgelora_runtime.errors import EdgeloraError, InputError, MissingExtraError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgelora.data.rows import Row
    from edgelora.in_torch.train_config import TrainConfig

_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")


@dataclass(frozen=True)
class TrainReport:
    """The result of a training run.

    rows: in the file. rows_cut: of these, how many were cut to max_length. rows_left_out: how many had nothing to learn within
    it. train_loss: mean over all steps, in nats per completion token. seconds: training only.
    """

    output: Path
    rows: int
    rows_cut: int
    rows_left_out: int
    steps: int
    train_loss: float
    seconds: float
    base_sha256: str


def train(config: TrainConfig, *, on_progress: Callable[[int, int, str], None] = lambda done, total, what: None) -> TrainReport:
    """Trains one adapter and writes it as a PEFT folder.

    The folder has fp16 factors and an edgelora.json.
    Computes in fp32 on a CPU, and in bf16 or fp16 on a GPU. Calls on_progress(done, total, "steps") after every step.
    Raises InputError for unusable data, base or output, before the base is loaded where that can be, and then leaves the output
    unchanged. A failure after the last step keeps the trained adapter, and the error says where.
    """
    require_packages()
    rows, data_sha256 = read_rows(config.data), hash_data(config.data)  # before the imports, which take seconds
    base = Base.find(config.base)  # refuses now what export would refuse after the training
    if config.merge_aware:
        check_merge_aware(base)

    import datasets  # noqa: F401  (before quiet_libraries, which then silences its progress bars)

    trained, provenance = None, None
    try:
        with staged_folder(config.output, marker=CONFIG) as folder, quiet_libraries(whole_process=False):
            check_targets(base.config, config.target_modules)
            tokenizer = load_tokenizer(base)
            encoded, cut = encode_for_training(RowEncoder(tokenizer, config.template_options), rows, config)
            provenance = _describe_run(config, base, data_sha256, rows=len(rows), cut=cut, left_out=len(rows) - len(encoded))
            from transformers import set_seed  # here, as it loads libraries that print

            set_seed(config.seed)
            held = load_held_base(base, config.quant, merge_aware=config.merge_aware)
            trainer = make_trainer(config, held, tokenizer, folder, encoded, on_progress)
            if config.merge_aware:
                hold_merged(trainer.model, base.config)
            check_room(trainer.model, folder)
            started = time.perf_counter()
            result = trainer.train()
            seconds = time.perf_counter() - started
            check_factors(trainer.model)
            trained = trainer.model
            save_adapter(trained, folder)
            provenance = replace(provenance, steps=int(result.global_step))
            write_provenance(folder, provenance)
    except Exception as error:
        if trained is None:
            raise
        kind = ResourceError if isinstance(error, OSError) else EdgeloraError
        raise kind(f"{first_line(error)}; {keep_adapter(trained, config.output, provenance)}") from error
    return TrainReport(
        output=config.output,
        rows=len(rows),
        rows_cut=provenance.rows_cut,
        rows_left_out=provenance.rows_left_out,
        steps=provenance.steps,
        train_loss=float(result.training_loss),
        seconds=seconds,
        base_sha256=base.sha256,
    )


def encode_for_training(encoder: RowEncoder, rows: Sequence[Row], config: TrainConfig) -> tuple[list[LearnedTokens], int]:
    """Encodes rows, and leaves out those that have nothing to learn within max_length. Also returns how many are cut to it.

    Raises InputError if no row is left, or if the tokenizer has no end of text to teach.
    """
    if encoder.tokenizer.eos_token is None:
        raise InputError(
            f"the tokenizer of {config.base} has no eos_token, so an adapter cannot learn to stop; "
            "set one in tokenizer_config.json"
        )
    whole = [encoder.learn(row) for row in rows]
    fitting = [row for row in whole if any(row.learned[: config.max_length])]
    if not fitting:
        nearest = min((row.learned.index(True) + 1 for row in whole if any(row.learned)), default=0)
        raise InputError(
            f"data file {config.data}: no row has a token to learn among its first max_length = {config.max_length}; "
            + (f"the nearest is its token {nearest}; raise max_length or shorten the prompts" if nearest else "give longer rows")
        )
    return [row.cut(config.max_length) for row in fitting], sum(len(row.tokens) > config.max_length for row in fitting)


def _describe_run(config: TrainConfig, base: Base, data_sha256: str, *, rows: int, cut: int, left_out: int) -> Provenance:
    return Provenance(
        base_name=base.name,
        base_sha256=base.sha256,
        base_quantization=config.quant,
        data_sha256=data_sha256,
        data_rows=rows,
        init="default" if config.composable is None else f"composable: slot {config.composable}",
        seed=config.seed,
        rank=config.rank,
        alpha=config.alpha,
        steps=0,
        learning_rate=config.lr,
        data_file=_relative(config.data, config.output),
        rows_cut=cut,
        rows_left_out=left_out,
        template_options=dict(config.template_options),
        merge_aware=config.merge_aware,
    )


def load_base(base: Base, quant: str) -> tuple[Any, Any]:
    """Loads a base as training holds it, and its tokenizer. See load_held_base."""
    require_packages()
    tokenizer = load_tokenizer(base)
    return load_held_base(base, quant), tokenizer


def load_held_base(base: Base, quant: str, *, merge_aware: bool = False) -> Any:
    """Loads a base as training holds it, on a GPU if there is one.

    merge_aware: True leaves the weights in float32, for hold_merged() to round together with the adapter.
    """
    import torch
    from transformers import BitsAndBytesConfig

    dtype = torch.float32 if merge_aware else compute_dtype()
    quant = "none" if merge_aware else quant
    nf4 = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    device = {"": torch.cuda.current_device()} if torch.cuda.is_available() else {"": "cpu"}
    with quiet_libraries(whole_process=False):
        model = load_model(base, dtype=dtype, device_map=device, quantization_config=nf4 if quant == "nf4" else None)
    if quant == "int4":
        _round_to_int4(model)
    return model


def require_packages() -> None:
    """Raises MissingExtraError for packages of training that are not installed."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingExtraError(", ".join(missing), "train")


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
