"""Trains a LoRA adapter on a quantized base (QLoRA), with TRL's trainer and PEFT."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgelora.adapters.folder import CONFIG, Provenance, write_provenance
from edgelora.data.calibration import hash_data
from edgelora.data.encode_rows import LearnedTokens, RowEncoder, fit_rows
from edgelora.data.rows import read_rows
from edgelora.data.sources import find_data
from edgelora.data.split import split_rows
from edgelora.in_torch.adapter_start import SUBTRACTED, adopt_adapter, describe_start
from edgelora.in_torch.merge_aware import check_merge_aware, hold_merged
from edgelora.in_torch.packing import pack_rows
from edgelora.in_torch.preferences import encode_preferences, read_preferences
from edgelora.in_torch.run.checkpoints import describe_run, find_checkpoint, find_last, put_weights, read_step, remove_checkpoints
from edgelora.in_torch.run.course import Course, list_validations
from edgelora.in_torch.run.estimate import estimate_run
from edgelora.in_torch.run.optimizers import describe_fallback
from edgelora.in_torch.run.processes import count_processes, find_local_place, is_first_process, uses_fsdp
from edgelora.in_torch.run.records import write_records
from edgelora.in_torch.save_adapter import check_factors, check_room, keep_adapter, save_adapter
from edgelora.in_torch.target_modules import check_targets
from edgelora.in_torch.trainer import Examples, check_run, compute_dtype, make_trainer
from edgelora_export.base.base import Base
from edgelora_export.base.tokenizer import load_tokenizer
from edgelora_export.quantize.int4 import quantize_rtn
from edgelora_export.weights.publish import staged_folder
from edgelora_export.weights.torch_model import first_line, load_model, quiet_libraries
from edgelora_runtime.errors import INTERRUPTED, EdgeloraError, InputError, MissingExtraError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from edgelora.data.rows import Row
    from edgelora.in_torch.train_config import TrainConfig

_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "PIL")


class TrainingStoppedError(EdgeloraError):
    """The end of a run on request, before its last step.

    checkpoint: the folder from which --resume goes on. progress: what is saved, for a message.
    """

    exit_code = INTERRUPTED

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.progress = f"step {read_step(checkpoint)} is saved in {checkpoint}"
        super().__init__(f"training stopped: {self.progress}; go on with --resume")


@dataclass(frozen=True)
class TrainReport:
    """The result of a training run.

    rows: in the file. rows_cut: of these, how many were cut to max_length. rows_left_out: how many had nothing to learn within
    it. train_loss: mean over all steps, in nats per completion token. validation_loss: of the adapter that was kept, None without
    validation rows. kept_step: the step after which it was taken. seconds: training only, since the run began or was resumed.
    loss_on: in how many rows the tokens with loss are told by what, as RowEncoder.describe_mask.
    """

    output: Path
    rows: int
    rows_cut: int
    rows_left_out: int
    steps: int
    train_loss: float
    seconds: float
    base_sha256: str
    validation_loss: float | None = None
    kept_step: int = 0
    loss_on: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rows:
    """The rows of a run, before they are tokens, as read_rows() or read_preferences() gives them. hashes: of their files."""

    learn: Sequence[Any]
    validate: Sequence[Any]
    hashes: dict[str, str]


def train(
    config: TrainConfig,
    *,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    on_message: Callable[[str], None] = lambda message: None,
    watch_for_stop: Callable[[], AbstractContextManager[Callable[[], bool]]] = lambda: nullcontext(lambda: False),
) -> TrainReport:
    """Trains one adapter and writes it as a PEFT folder.

    The folder has fp16 factors, an edgelora.json, the metrics of each step, a picture of the losses and a model card.
    Computes in fp32 on a CPU, and in bf16 or fp16 on a GPU. Calls on_progress(done, total, what) after every step, and
    on_message(line) for what the user should know before the first.
    watch_for_stop: opens a context around the steps that gives a function. Once that is true, the run ends after the step at work
    with a checkpoint and raises TrainingStoppedError.
    Raises InputError for unusable data, base, checkpoint or output, before the base is loaded where that can be, and then leaves
    the output unchanged. A failure after the last step keeps the trained adapter, and the error says where.
    """
    require_packages()
    check_run(config)
    rows = _read_data(config)  # before the imports, which take seconds
    base = Base.find(config.base)  # refuses now what export would refuse after the training
    if config.merge_aware:
        check_merge_aware(base)
    config = adopt_adapter(config, base)
    description = describe_run(config, {**rows.hashes, "base_sha256": base.sha256}, count_processes())
    resume = find_checkpoint(config, description)

    import datasets  # noqa: F401  (before quiet_libraries, which then silences its progress bars)

    trained, provenance = None, None
    try:
        with _open_output(config.output) as folder, quiet_libraries(whole_process=False):
            check_targets(base.config, config.target_modules)
            check_targets(base.config, config.modules_to_save)
            tokenizer = load_tokenizer(base)
            encoder = RowEncoder(tokenizer, config.template_options)
            examples, cut = _encode(encoder, rows, config)
            left_out = len(rows.learn) - len(examples.learn)
            provenance = _describe_adapter(config, base, rows, cut=cut, left_out=left_out)
            if not config.preferences:
                provenance = replace(provenance, loss_on=encoder.count_masks(rows.learn))
            from transformers import set_seed  # here, as it loads libraries that print

            if config.packing:
                examples = Examples(pack_rows(examples.learn, config.max_length), pack_rows(examples.validate, config.max_length))
            set_seed(config.seed)
            course = Course(config, folder, description, resume, on_progress)
            held = load_held_base(base, config.quant, merge_aware=config.merge_aware)
            trainer = make_trainer(config, base, held, tokenizer, examples, course)
            if config.merge_aware:
                hold_merged(trainer.model, base.config)
            check_room(trainer.model, folder)
            for line in (describe_fallback(config.optimizer), *estimate_run(trainer, config, examples)):
                if line is not None and is_first_process():  # all processes estimate, as TRL gathers figures from all
                    on_message(line)
            started = time.perf_counter()
            with watch_for_stop() as course.should_stop:
                result = trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
            seconds = time.perf_counter() - started
            steps, history = int(result.global_step), trainer.state.log_history
            if course.stopped and steps < trainer.state.max_steps:
                last = find_last(course.checkpoints)
                raise KeyboardInterrupt if last is None else TrainingStoppedError(last)  # none is written under FSDP
            if course.best is not None:
                put_weights(trainer.model, course.best)
            check_factors(trainer.model)
            trained = trainer.model
            provenance = replace(provenance, steps=steps)
            report = _make_report(config, provenance, history, seconds)
            if is_first_process():
                save_adapter(trained, folder)
                write_provenance(folder, provenance)
                write_records(folder, config, provenance, history, report.kept_step)
    except Exception as error:
        if trained is None:
            raise
        kind = ResourceError if isinstance(error, OSError) else EdgeloraError
        raise kind(f"{first_line(error)}; {keep_adapter(trained, config.output, provenance)}") from error
    if is_first_process():
        remove_checkpoints(course.checkpoints)
    return report


@contextmanager
def _open_output(output: Path) -> Iterator[Path]:
    """Yields the folder that becomes the output, or in the other processes of a run one that is thrown away."""
    if is_first_process():
        with staged_folder(output, marker=CONFIG) as folder:
            yield folder
    else:
        with TemporaryDirectory() as name:
            yield Path(name)


def _read_data(config: TrainConfig) -> _Rows:
    """Reads the rows to learn and those to validate on, and hashes their files."""
    read: Callable[[Path], list[Any]] = read_preferences if config.preferences else partial(read_rows, format=config.format)
    learn, validate = read(config.data), []
    hashes = {"data_sha256": hash_data(config.data)}
    if isinstance(config.validation, str):
        validate = read(Path(config.validation))
        hashes["validation_sha256"] = hash_data(Path(config.validation))
    elif config.validation is not None:
        learn, validate = split_rows(learn, config.validation, config.seed)
    return _Rows(learn, validate, hashes)


def _encode(encoder: RowEncoder, rows: _Rows, config: TrainConfig) -> tuple[Examples, int]:
    """Encodes the rows of a run. Also returns how many of those to learn are cut to max_length."""
    if config.preferences:
        learn, cut = encode_preferences(encoder, rows.learn, config.max_length)
        return Examples(learn, encode_preferences(encoder, rows.validate, config.max_length)[0] if rows.validate else ()), cut
    encoded, cut = encode_for_training(encoder, rows.learn, config)
    return Examples(encoded, encode_for_training(encoder, rows.validate, config)[0] if rows.validate else ()), cut


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
    fitting, cut = fit_rows(whole, config.max_length)
    if not fitting:
        nearest = min((row.learned.index(True) + 1 for row in whole if any(row.learned)), default=0)
        raise InputError(
            f"data file {config.data}: no row has a token to learn among its first max_length = {config.max_length}; "
            + (f"the nearest is its token {nearest}; raise max_length or shorten the prompts" if nearest else "give longer rows")
        )
    return fitting, cut


def _make_report(config: TrainConfig, provenance: Provenance, history: Sequence[dict[str, Any]], seconds: float) -> TrainReport:
    losses = [entry["loss"] for entry in history if "loss" in entry]
    validations, kept_step, kept_loss = list_validations(history), provenance.steps, None
    if validations and config.keep == "best":
        kept_step, kept_loss = min(validations, key=lambda validation: validation[1])
    elif validations:
        kept_loss = validations[-1][1]
    return TrainReport(
        output=config.output,
        rows=provenance.data_rows,
        rows_cut=provenance.rows_cut,
        rows_left_out=provenance.rows_left_out,
        steps=provenance.steps,
        train_loss=sum(losses) / len(losses),
        seconds=seconds,
        base_sha256=provenance.base_sha256,
        loss_on=provenance.loss_on,
        validation_loss=kept_loss,
        kept_step=kept_step,
    )


def _describe_adapter(config: TrainConfig, base: Base, rows: _Rows, *, cut: int, left_out: int) -> Provenance:
    return Provenance(
        base_name=base.name,
        base_sha256=base.sha256,
        base_quantization=config.quant,
        data_sha256=rows.hashes["data_sha256"],
        data_rows=len(rows.learn),
        init=describe_start(config),
        seed=config.seed,
        rank=config.rank * _widening(config),
        alpha=config.alpha * _widening(config) / (1 if not config.rslora else _widening(config) ** 0.5),
        steps=0,
        learning_rate=config.lr,
        data_file="" if config.preferences else _relative(find_data(config.data), config.output),  # export reads plain rows alone
        rows_cut=cut,
        rows_left_out=left_out,
        template_options=dict(config.template_options),
        merge_aware=config.merge_aware,
    )


def _widening(config: TrainConfig) -> int:
    """Returns how many times the rank of training an adapter has when it is saved. See join_start()."""
    return 2 if config.start in SUBTRACTED else 1


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
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if uses_fsdp() else torch.uint8,  # FSDP shards tensors of one type together
    )
    device: Any = {"": find_local_place()} if torch.cuda.is_available() else {"": "cpu"}
    if uses_fsdp():
        device = None  # accelerate shards the model itself
    with quiet_libraries(whole_process=False):
        model = load_model(base, dtype=dtype, device_map=device, quantization_config=nf4 if quant == "nf4" else None)
    # Else bitsandbytes repacks NF4 weights with scales in bf16 once the model evaluates, in the midst of training too, or fails
    # if their width is no multiple of a block:
    # https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/nn/modules.py, forward
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
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
