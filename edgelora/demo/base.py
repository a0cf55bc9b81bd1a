"""Makes the demo's base: a tokenizer and a tiny Llama.

The model is pretrained in two minutes on generated text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from edgelora.demo.tasks import general_row
from edgelora_export.weights.publish import staged_folder
from edgelora_export.weights.torch_model import quiet_libraries
from edgelora_runtime.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from edgelora.data.rows import Row

BOS, EOS = "<s>", "</s>"
# Each turn is a separate document, as in pretraining: <s>Command: text\nanswer</s>
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ bos_token + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
)
_TOKENIZER_ROWS = 6000
_IGNORED = -100  # cross entropy's default ignore_index


@dataclass(frozen=True)
class BaseSettings:
    """The shape and training of the demo's base.

    vocabulary: maximum number of tokens. heads, kv_heads: query heads and key-value heads (GQA). lr, muon_lr: peak learning rates
    of AdamW (embedding, norms) and Muon (matrices). batch_size: rows per step.
    """

    vocabulary: int = 768
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 256
    steps: int = 1100
    batch_size: int = 64
    lr: float = 3e-3
    muon_lr: float = 0.02
    warmup_steps: int = 30


def make_base(
    folder: Path,
    settings: BaseSettings | None = None,
    *,
    seed: int = 0,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> float:
    """Pretrains the base and saves it in the Hugging Face layout.

    Returns the smoothed final loss, in nats per token.
    Calls on_progress(done, total, what) after every step. Raises MissingExtraError without torch or transformers.
    """
    settings = settings or BaseSettings()
    try:
        import torch
        from transformers import GenerationConfig
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "train") from error
    tokenizer = make_tokenizer(settings.vocabulary, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _make_model(settings, len(tokenizer))
        loss = _pretrain(model, tokenizer, settings, seed, on_progress)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**ends)  # type: ignore[no-untyped-call,unused-ignore]
    with staged_folder(folder, marker="config.json") as staged, quiet_libraries():
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    return loss


def make_tokenizer(vocabulary: int, seed: int) -> Any:
    """Trains a byte-level BPE tokenizer on the general text.

    Digits are single tokens, and every text starts with <s>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)  # noqa: S311  (data, not secrets)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # can encode any text, as bytes if need be
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{row.prompt}{row.completion}" for row in _draw_rows(rng, _TOKENIZER_ROWS)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call,unused-ignore]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _make_model(settings: BaseSettings, vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=settings.hidden,
            intermediate_size=settings.mlp,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _pretrain(
    model: Any, tokenizer: Any, settings: BaseSettings, seed: int, on_progress: Callable[[int, int, str], None]
) -> float:
    """Trains on the general commands, with the loss on their answers only.

    Returns the smoothed final loss.
    """
    import torch

    from edgelora.demo.muon import Muon

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in name)]
    optimizers = (
        Muon(matrices, lr=settings.muon_lr, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0),
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings)) for optimizer in optimizers]
    smooth = 0.0
    model.train()
    rng = random.Random(seed)  # noqa: S311  (data, not secrets)
    for step, rows in enumerate(islice(_draw_batches(rng, settings.batch_size), settings.steps)):
        ids, labels = _encode(tokenizer, rows)
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != _IGNORED
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        smooth += (loss.item() - smooth) * max(0.02, 1 / (step + 1))
        on_progress(step + 1, settings.steps, f"loss {smooth:.3f}")
    model.eval()
    return smooth


def _rate(step: int, settings: BaseSettings) -> float:
    """Returns the learning rate as a share of its peak.

    It warms up linearly, stays constant for half of the steps, then decays linearly to 2%.
    """
    return min(1.0, (step + 1) / settings.warmup_steps, max(0.02, 2 * (1 - step / settings.steps)))


def _draw_rows(rng: random.Random, count: int) -> list[Row]:
    return [general_row(rng) for _ in range(count)]


def _draw_batches(rng: random.Random, size: int) -> Iterator[list[Row]]:
    """Yields batches of rows of similar length, endlessly and in random order.

    Less padding halves the work.
    """
    pool = 16
    while True:
        rows = sorted(_draw_rows(rng, size * pool), key=lambda row: len(str(row.prompt)) + len(row.completion))
        starts = list(range(0, len(rows), size))
        rng.shuffle(starts)
        yield from (rows[start : start + size] for start in starts)


def _encode(tokenizer: Any, rows: Sequence[Row]) -> tuple[Any, Any]:
    """Encodes rows as token ids and labels, int64 (rows, T).

    A row is prompt, completion and end. Prompts and padding have no labels.
    """
    import torch

    prompts = tokenizer([row.prompt for row in rows])["input_ids"]
    completions = tokenizer([row.completion + EOS for row in rows], add_special_tokens=False)["input_ids"]
    width = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
    ids = torch.full((len(rows), width), tokenizer.eos_token_id)
    labels = torch.full((len(rows), width), _IGNORED)
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        stop = len(prompt) + len(completion)
        ids[index, :stop] = torch.tensor(prompt + completion)
        labels[index, len(prompt) : stop] = torch.tensor(completion)
    return ids, labels
