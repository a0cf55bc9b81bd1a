"""Scores a bundle's variant on rows, as onnxruntime runs it, and what another model wrote to them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.data.intervals import bootstrap_interval
from edgelora.data.scores import compile_pattern, count_scores, exact_match, main_score, match_found, rouge_l, slot_f1
from edgelora_runtime.bundle.router import AUTO
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
    """The scores of a variant or an adapter.

    exact_match: share of rows whose completion is written exactly, by greedy decoding. None for plain text, to which nothing is
    written. slot_f1: slot F1 if the completions are slots, else None. loss: mean negative log likelihood of the right completion,
    in nats per token. perplexity: its exponential. routed: with variant "auto", how many rows went to each variant. rouge_l: mean
    F-measure, regex: share of rows in which a pattern finds the same in both answers, None unless asked for. intervals: of each
    score, its 95% bootstrap interval over rows.
    """

    rows: int
    exact_match: float | None
    slot_f1: float | None
    loss: float
    perplexity: float
    routed: Mapping[str, int] = field(default_factory=dict)
    rouge_l: float | None = None
    regex: float | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Measures:
    """What is scored beside exact match, slot F1 and loss.

    rouge: ROUGE-L too. regex: a pattern that finds in an answer what counts.
    """

    rouge: bool = False
    regex: str | None = None


def evaluate(
    runtime: Runtime,
    rows: Sequence[Row],
    *,
    variant: str | None = None,
    mix: Mapping[str, float] | None = None,
    max_tokens: int = 64,
    template_options: Mapping[str, Any] | None = None,
    measures: Measures | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Scores:
    """Scores one variant, or one live mix, on rows.

    The other arguments are those of Runtime.generate. template_options are for rows of messages. With variant "auto", the router
    picks a variant by each row's prompt only, and that variant writes and rates the completion.
    """
    check_rows(rows, measures)
    if variant == AUTO and (texts := [row.place for row in rows if is_text(row)]):
        raise InputError(f"{texts[0]}: plain text has no prompt by which {AUTO} could choose a variant; name one")
    written: list[str | None] = []
    losses: list[tuple[float, int]] = []
    routed: Counter[str] = Counter()
    for done, row in enumerate(rows):
        on_progress(done, len(rows), "rows")
        chosen = variant
        if is_text(row):
            written.append(None)
        else:
            answer = write_answer(
                runtime, row, variant=variant, mix=mix, max_tokens=max_tokens, template_options=template_options
            )
            written.append(answer.text)
            if answer.route is not None:
                chosen = answer.variant
                routed[chosen] += 1
        losses.append(completion_loss(runtime, row, variant=chosen, mix=mix, template_options=template_options))
    on_progress(len(rows), len(rows), "rows")
    return replace(score_answers(rows, written, losses, measures), routed=dict(routed))


def check_rows(rows: Sequence[Row], measures: Measures | None = None) -> None:
    """Raises InputError for rows that cannot be scored, and UsageError for a pattern that cannot be used.

    Called before anything is computed.
    """
    if not rows:
        raise InputError("there are no rows to evaluate")
    if silent := [row.place for row in rows if not row.completion]:
        raise InputError(f"{silent[0]}: the answer has no text, and calls of tools are trained on but not scored")
    right = [row for row in rows if not is_text(row)]
    completions = [row.completion for row in right]
    if measures and measures.regex is not None:
        match_found(completions, completions, compile_pattern(measures.regex), [row.place for row in right])
    if measures and measures.rouge:
        rouge_l([], [])  # is it installed?


def score_answers(
    rows: Sequence[Row],
    written: Sequence[str | None],
    losses: Sequence[tuple[float, int]],
    measures: Measures | None = None,
) -> Scores:
    """Scores what a model wrote to each row, and its loss there.

    written: None for rows of plain text. losses: of the right completion, in nats, and its number of tokens.
    """
    measures = measures or Measures()
    pairs = [(text, row) for text, row in zip(written, rows, strict=True) if text is not None]
    texts, right = [text for text, _ in pairs], [row.completion for _, row in pairs]
    parts: dict[str, Sequence[tuple[float, float]]] = {"loss": losses}
    if pairs:
        parts["exact_match"] = [(exact_match([one], [other]), 1) for one, other in zip(texts, right, strict=True)]
        if slot_f1(texts, right) is not None:
            parts["slot_f1"] = count_scores(texts, right)
        if measures.rouge:
            parts["rouge_l"] = [(share, 1) for share in rouge_l(texts, right)]
        if measures.regex is not None:
            places = [row.place for _, row in pairs]
            parts["regex"] = [(same, 1) for same in match_found(texts, right, compile_pattern(measures.regex), places)]
    means = {name: sum(one for one, _ in each) / sum(other for _, other in each) for name, each in parts.items()}
    intervals = {name: bootstrap_interval(each) for name, each in parts.items()}
    low, high = intervals["loss"]
    intervals["perplexity"] = (_exponentiate(low), _exponentiate(high))
    return Scores(
        rows=len(rows),
        exact_match=means.get("exact_match"),
        slot_f1=means.get("slot_f1"),
        loss=means["loss"],
        perplexity=_exponentiate(means["loss"]),
        rouge_l=means.get("rouge_l"),
        regex=means.get("regex"),
        intervals=intervals,
    )


def is_text(row: Row) -> bool:
    """True for plain text, to which a model writes no answer."""
    return row.prompt == ""


def _exponentiate(loss: float) -> float:
    return math.exp(min(loss, 700.0))


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
