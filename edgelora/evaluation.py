"""Scores a bundle's variant on rows, as onnxruntime runs it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.data.scores import exact_match, main_score, slot_f1
from edgelora_runtime.errors import InputError
from edgelora_runtime.session.kv_cache import shared_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgelora.data.chats import Chat
    from edgelora.data.rows import Row
    from edgelora_runtime import GenerateOptions, Generation, Runtime


@dataclass(frozen=True)
class Scores:
    """A variant's scores.

    exact_match: share of rows whose completion is written exactly, by greedy decoding. slot_f1: slot F1 if the completions are
    slots, else None. loss: mean negative log likelihood of the right completion, in nats per token. perplexity: its
    exponential. routed: with variant "auto", how many rows went to each variant.
    """

    rows: int
    exact_match: float
    slot_f1: float | None
    loss: float
    perplexity: float
    routed: Mapping[str, int] = field(default_factory=dict)


def evaluate(
    runtime: Runtime,
    rows: Sequence[Row],
    *,
    variant: str | None = None,
    mix: Mapping[str, float] | None = None,
    max_tokens: int = 64,
    template_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Scores:
    """Scores one variant, or one live mix, on rows.

    The other arguments are those of Runtime.generate. template_options are for rows of messages. With variant "auto", the router
    picks a variant by each row's prompt only, and that variant writes and rates the completion.
    """
    if not rows:
        raise InputError("there are no rows to evaluate")
    if silent := [row.place for row in rows if not row.completion]:
        raise InputError(f"{silent[0]}: the answer has no text, and calls of tools are trained on but not scored")
    written: list[str] = []
    nats, tokens = 0.0, 0
    routed: Counter[str] = Counter()
    for done, row in enumerate(rows):
        on_progress(done, len(rows), "rows")
        answer = write_answer(runtime, row, variant=variant, mix=mix, max_tokens=max_tokens, template_options=template_options)
        written.append(answer.text)
        chosen = variant
        if answer.route is not None:
            chosen = answer.variant
            routed[chosen] += 1
        row_nats, row_tokens = completion_loss(runtime, row, variant=chosen, mix=mix, template_options=template_options)
        nats, tokens = nats + row_nats, tokens + row_tokens
    on_progress(len(rows), len(rows), "rows")
    right = [row.completion for row in rows]
    loss = nats / tokens
    perplexity = math.exp(min(loss, 700.0))
    return Scores(len(rows), exact_match(written, right), slot_f1(written, right), loss, perplexity, dict(routed))


def score_variant(
    runtime: Runtime,
    rows: Sequence[Row],
    *,
    variant: str | None = None,
    mix: Mapping[str, float] | None = None,
    max_tokens: int = 64,
) -> float:
    """Computes only the main score, without the loss, at half the work of evaluate()."""
    written = [write_answer(runtime, row, variant=variant, mix=mix, max_tokens=max_tokens).text for row in rows]
    return main_score(written, [row.completion for row in rows])


def write_answer(
    runtime: Runtime,
    row: Row,
    *,
    variant: str | None = None,
    mix: Mapping[str, float] | None = None,
    max_tokens: int = 64,
    template_options: Mapping[str, Any] | None = None,
) -> Generation:
    """Continues a row's prompt by greedy decoding, or answers its conversation."""
    options: GenerateOptions = {"variant": variant, "mix": mix, "max_tokens": max_tokens}
    if isinstance(row.prompt, str):
        return runtime.generate(row.prompt, **options)
    return runtime.generate(row.prompt.messages, **options, **_chat_options(row.prompt, template_options))


def completion_loss(
    runtime: Runtime,
    row: Row,
    *,
    variant: str | None = None,
    mix: Mapping[str, float] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> tuple[float, int]:
    """Returns a completion's negative log likelihood given its prompt, in nats, and its number of tokens."""
    tokenizer = runtime.find_tokenizer(variant, mix)
    if isinstance(row.prompt, str):
        prompt, whole = (tokenizer.encode_prompt(text) for text in (row.prompt, row.prompt + row.completion))
    else:
        rendered = tokenizer.render_chat(row.prompt.messages, **_chat_options(row.prompt, template_options))
        prompt, whole = (tokenizer.encode(text, special_tokens=False) for text in (rendered, rendered + row.completion))
    start = max(1, shared_prefix(prompt, whole))  # a token may span prompt and completion, and the first token has no likelihood
    logits = runtime.logits(whole[:-1], variant=variant, mix=mix)[start - 1 :]
    return float(-log_likelihood(logits, whole[start:]).sum()), len(whole) - start


def _chat_options(chat: Chat, template_options: Mapping[str, Any] | None) -> Any:
    """Returns what the chat template gets beside a row's messages."""
    given = {"tools": chat.tools, "template_options": dict(template_options or {})}
    return {name: value for name, value in given.items() if value}


def log_likelihood(logits: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float64]:
    """The log probability of each token under logits (T, V), float64 (T,)."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    chosen: NDArray[np.float64] = wide[np.arange(len(tokens)), np.asarray(tokens)]
    chosen -= np.log(np.exp(wide).sum(axis=1))
    return chosen
