"""Heals an adapter for the grid that ships: it learns, merged and in int4, to say what it says unmerged.

A short distillation without labels. The teacher is the adapter on the base of its training, the student the same factors in a
merge-aware forward pass. Both are compared where the adapter answers: a prompt's tokens are more, and diverge more, so that they
would make most of the loss. The result is merge-aware, so export keeps its codes.
"""

from __future__ import annotations

import math
import os
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.adapters.checks import check_same_base
from edgelora.adapters.folder import CONFIG, Adapter, Provenance, write_provenance
from edgelora.adapters.provenance import TRAINED_ON
from edgelora.data.calibration import find_training_data, gather_samples, read_general_text
from edgelora.data.encode_rows import RowEncoder
from edgelora.in_torch.merge_aware import check_merge_aware
from edgelora.in_torch.reference import load_adapted, load_merged
from edgelora.in_torch.save_adapter import check_factors, check_room, keep_adapter, save_adapter
from edgelora.in_torch.train import require_packages
from edgelora.in_torch.trainer import compute_dtype
from edgelora_export.base.base import Base
from edgelora_export.base.tokenizer import load_tokenizer
from edgelora_export.plan.calibration import Sample
from edgelora_export.weights.publish import staged_folder
from edgelora_export.weights.torch_model import first_line, quiet_libraries
from edgelora_runtime.errors import EdgeloraError, InputError, ResourceError, list_wrong

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

HEAL_LR = 1e-3
_LOGITS = 1 << 26  # numbers in the logits of one forward pass
_WARMUP = 0.05  # of all steps
_HELD_OUT, _MOST_HELD_OUT = 8, 32  # one sample in this many measures the result, and so many at most


@dataclass(frozen=True)
class HealConfig:
    """The settings of a healing run.

    base: folder, GGUF file or hub id. adapter: a PEFT folder of plain LoRA. output: folder for the healed adapter. steps: of the
    optimizer. data: JSON lines of rows or texts, whose answers do not count as labels. None takes the adapter's own training rows
    if edgelora.json finds them, else general text. quant: how training held the base, for an adapter without edgelora.json. None
    means unquantized.
    lr: peak learning rate, reached after a short warmup, then decaying linearly to 0. batch_size: rows per step. max_length: in
    tokens. Longer rows are cut.
    """

    base: str
    adapter: Path
    output: Path
    steps: int = 100
    data: Path | None = None
    quant: str | None = None
    lr: float = HEAL_LR
    batch_size: int = 8
    max_length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = list_wrong(
            (
                ("heal", self.steps, self.steps >= 1, "1 step or more"),
                ("lr", self.lr, 0 < self.lr < math.inf, "more than 0"),
                ("batch_size", self.batch_size, self.batch_size >= 1, "1 or more"),
                ("max_length", self.max_length, self.max_length >= 2, "2 or more"),
                ("seed", self.seed, 0 <= self.seed < 1 << 32, "0 to 2^32 - 1"),
            )
        )
        if wrong:
            raise InputError("; ".join(wrong))


@dataclass(frozen=True)
class HealReport:
    """The result of a healing run.

    samples: that it saw. source: their file, or "general text". kl_before, kl_after: mean KL(unmerged ‖ merged int4) in nats per
    token of the answers, or of the texts, on samples that it did not see. seconds: of the steps only.
    """

    output: Path
    steps: int
    samples: int
    source: str
    kl_before: float
    kl_after: float
    seconds: float


def heal(config: HealConfig, *, on_progress: Callable[[int, int, str], None] = lambda done, total, what: None) -> HealReport:
    """Trains an adapter's factors so that its merged int4 variant says what the unmerged adapter says.

    Calls on_progress(done, total, "steps") after every step. Raises InputError for an adapter that is no plain LoRA, is
    merge-aware already or is of another base, and for unusable data, and then leaves the output unchanged. A failure after the
    last step keeps the healed adapter, and the error says where.
    """
    require_packages()
    base = Base.find(config.base)
    check_merge_aware(base)
    adapter = _open_adapter(config, base)
    provenance = adapter.provenance

    import datasets  # noqa: F401  (before quiet_libraries, which then silences its progress bars)

    healed: Any = None
    described = _describe(config, adapter, base)
    try:
        with staged_folder(config.output, marker=CONFIG) as folder, quiet_libraries(whole_process=False):
            options = provenance.template_options if provenance is not None else {}
            samples, source = gather_texts(config, adapter, RowEncoder(load_tokenizer(base), options))
            count = min(_MOST_HELD_OUT, len(samples) // _HELD_OUT)
            held_out, fit = samples[:count] or samples, samples[count:]
            held = adapter.trained_on if adapter.trained_on in TRAINED_ON else "none"  # a mix may be "mixed"
            teacher = load_adapted(base, config.adapter, held)
            student = load_merged(base, config.adapter, trainable=True)
            check_room(student, folder)
            before = _measure(teacher, student, held_out)
            started = time.perf_counter()
            _distil(config, teacher, student, fit, on_progress)
            seconds = time.perf_counter() - started
            check_factors(student)
            after = _measure(teacher, student, held_out)
            healed = student
            save_adapter(healed, folder)
            write_provenance(folder, described)
    except Exception as error:
        if healed is None:
            raise
        kind = ResourceError if isinstance(error, OSError) else EdgeloraError
        raise kind(f"{first_line(error)}; {keep_adapter(healed, config.output, described)}") from error
    return HealReport(config.output, config.steps, len(fit), source, before, after, seconds)


def gather_texts(config: HealConfig, adapter: Adapter, encoder: RowEncoder) -> tuple[list[Sample], str]:
    """Gathers shuffled samples of at most max_length tokens. Also returns where they are from.

    Raises InputError if every answer begins beyond max_length.
    """
    path = config.data or find_training_data(adapter)
    if path is None:
        encoded = [Sample(tuple(tokens)) for text in read_general_text() if len(tokens := encoder(text)) > 1]
        random.Random(config.seed).shuffle(encoded)  # noqa: S311  (not for secrets)
    else:
        encoded = gather_samples(path, encoder, config.steps * config.batch_size * config.max_length, config.seed)
    fitting = [Sample(each.tokens[: config.max_length], each.start) for each in encoded if each.start < config.max_length]
    if not fitting:
        nearest = min(each.start for each in encoded) + 1
        raise InputError(
            f"{path}: no answer begins within max_length = {config.max_length} tokens; raise it to {nearest} or more"
        )
    return fitting, "general text" if path is None else path.name


def _open_adapter(config: HealConfig, base: Base) -> Adapter:
    """Opens the adapter to heal. Raises InputError for one that cannot or need not be healed."""
    adapter = Adapter.open(config.adapter, base=base.config, trained_on=config.quant)
    check_same_base({adapter.name: adapter}, base.sha256)
    if not (config.adapter / CONFIG).is_file():
        raise InputError(f"adapter {config.adapter}: --heal takes a PEFT folder; write one with edgelora compose")
    if adapter.provenance is not None and adapter.provenance.merge_aware:
        raise InputError(f"adapter {config.adapter} is merge-aware already; export it as it is")
    return adapter


def _distil(
    config: HealConfig,
    teacher: Any,
    student: Any,
    samples: Sequence[Sample],
    on_progress: Callable[[int, int, str], None],
) -> None:
    """Trains the student's factors in place."""
    import torch

    factors = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=config.lr, weight_decay=0.0)
    warmup = max(1, round(_WARMUP * config.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (config.steps - step) / max(1, config.steps - warmup))
    )
    order = _draw(len(samples), config.seed)
    for step in range(config.steps):
        batch = [samples[next(order)] for _ in range(config.batch_size)]
        tokens = _count(batch)
        for part in _split(batch, student.config.vocab_size):
            divergence: Any = _diverge(teacher, student, part) / tokens
            if not bool(divergence.isfinite()):
                raise InputError(f"healing diverged at step {step + 1}; lower --lr")
            divergence.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_progress(step + 1, config.steps, "steps")


def _measure(teacher: Any, student: Any, samples: Sequence[Sample]) -> float:
    """Returns the mean KL(teacher ‖ student) in nats per token."""
    import torch

    with torch.no_grad():
        total = sum(float(_diverge(teacher, student, part)) for part in _split(samples, student.config.vocab_size))
    return total / _count(samples)


def _diverge(teacher: Any, student: Any, samples: Sequence[Sample]) -> torch.Tensor:
    """Computes KL(teacher ‖ student), summed over the predictions of all answers and of what follows them.

    Attention is causal, so padding at the end needs no mask.
    """
    import torch

    width = max(len(each.tokens) for each in samples)
    ids = torch.tensor([[*each.tokens, *[0] * (width - len(each.tokens))] for each in samples], device=student.device)
    places = [[each.start - 1 <= place < len(each.tokens) for place in range(width)] for each in samples]
    kept = torch.tensor(places, device=student.device)
    half = compute_dtype() == torch.bfloat16
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=half):
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits[kept].float().log_softmax(dim=-1)
        found = student(input_ids=ids, use_cache=False).logits[kept].float().log_softmax(dim=-1)
    return torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)


def _count(samples: Sequence[Sample]) -> int:
    """Counts the predictions that _diverge() compares."""
    return sum(len(each.tokens) - each.start + 1 for each in samples)


def _split(samples: Sequence[Sample], vocab_size: int) -> list[Sequence[Sample]]:
    """Splits samples, sorted by length, into parts whose logits are small enough for one forward pass."""
    count = max(1, _LOGITS // (vocab_size * max(len(each.tokens) for each in samples)))
    longest_last = sorted(samples, key=lambda each: len(each.tokens))
    return [longest_last[start : start + count] for start in range(0, len(samples), count)]


def _draw(count: int, seed: int) -> Any:
    """Yields places of samples without end, each once per round, in another order in every round."""
    generator = random.Random(seed)  # noqa: S311  (not for secrets)
    while True:
        places = list(range(count))
        generator.shuffle(places)
        yield from places


def _describe(config: HealConfig, adapter: Adapter, base: Base) -> Provenance:
    """Describes the healed adapter: its own origin, on the grid that it was healed for."""
    init = f"healed: {config.steps} steps from adapter {adapter.sha256[:12]}"
    old = adapter.provenance
    if old is None:
        return Provenance(
            base.name, base.sha256, "int4", "", 0, init, config.seed, adapter.rank, float(adapter.config["lora_alpha"]),
            config.steps, config.lr, merge_aware=True,
        )  # fmt: skip
    data = find_training_data(adapter)
    file = "" if data is None else Path(os.path.relpath(data, config.output)).as_posix()
    return replace(old, base_quantization="int4", init=init, data_file=file, merge_aware=True)
