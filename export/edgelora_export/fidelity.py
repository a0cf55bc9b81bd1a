"""How much of an adapter a quantized variant keeps: product by product in its weights, and in what onnxruntime says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelora_export.gptq import output_error
from edgelora_export.int4 import BlockQuantized, quantize_rtn
from edgelora_export.layer_stream import LayerStream, embed, read_layer
from edgelora_export.store import load_matrix, touches
from edgelora_runtime.manifest import ProductFidelity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from edgelora_export.calibration import Sample
    from edgelora_export.decoder import Linear
    from edgelora_export.draft import Draft
    from edgelora_export.variants import Delta

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

_LOGITS_BYTES = 1 << 26  # of one float64 array of logits, several of which are alive at once


@dataclass(frozen=True)
class Teacher:
    """The unmerged adapter on the float base, and the bare float base: final hidden states (T, H) per sample."""

    samples: Sequence[Sample]
    delta: Delta | None
    adapted: list[Floats]
    bare: list[Floats]
    products: dict[str, ProductFidelity]


@dataclass(frozen=True)
class Comparison:
    """A variant as onnxruntime runs it, against its teacher, over the predictions that count.

    kl_mean, kl_p99: KL(teacher ‖ variant) in nats per token, mean and 99th percentile. adapter_kl: KL(teacher ‖ bare float
    base), what the adapter changes; 0 without an adapter. top1: share of tokens with the same most likely token.
    perplexity, teacher_perplexity: of the samples' own tokens.
    """

    tokens: int
    kl_mean: float
    kl_p99: float
    adapter_kl: float
    top1: float
    perplexity: float
    teacher_perplexity: float


def run_teacher(draft: Draft, name: str, on_layer: Callable[[int], None] = lambda index: None) -> Teacher:
    """Streams a variant's held-out samples through the float base with and without its delta.

    On the way each product of a merged variant is compared with the weight that it stands for.
    """
    variant, decoder = draft.variants[name], draft.decoder
    samples = variant.calibration.held_out if variant.delta is not None else draft.base_calibration.held_out
    stream = LayerStream(decoder)
    bare = embed(draft.base, decoder, samples)
    adapted = embed(draft.base, decoder, samples, variant.delta) if variant.delta is not None else bare
    products: dict[str, ProductFidelity] = {}
    for index, layer in enumerate(decoder.layers):
        on_layer(index)
        plain = read_layer(draft.base, decoder, index, None)
        if variant.delta is None:
            bare = stream.run(index, plain, bare)
            adapted = bare
            continue
        changed = read_layer(draft.base, decoder, index, variant.delta)
        own = [linear for linear in layer.linears if variant.live is None and touches(variant.delta, linear)]
        inputs: dict[str, list[Floats]] = {linear.name: [] for linear in own}
        adapted = stream.run(index, changed, adapted, {product: seen.append for product, seen in inputs.items()})
        bare = stream.run(index, plain, bare)
        for linear in own:
            seen = np.concatenate(inputs.pop(linear.name))
            products[linear.name] = _compare_product(draft, name, linear, plain[linear.name], changed[linear.name], seen)
    return Teacher(samples, variant.delta, adapted, bare, products)


def compare(draft: Draft, teacher: Teacher, logits: Callable[[Sequence[int], int], Iterator[Floats]]) -> Comparison:
    """Compares a variant with its teacher.

    logits: from token ids and a number of positions, the variant's logits float32 (P, V) of that many at a time.
    """
    stream = LayerStream(draft.decoder)
    divergences: list[Doubles] = []
    moved: list[Doubles] = []
    agreed, nats, teacher_nats = 0, 0.0, 0.0
    for rows in _gather_rows(teacher, logits, max(1, _LOGITS_BYTES // (8 * draft.decoder.vocab_size))):
        wanted = log_softmax(stream.logits(draft.base, rows.adapted, teacher.delta))
        found = log_softmax(rows.found)
        divergences.append(_divergence(wanted, found))
        agreed += int((wanted.argmax(axis=1) == found.argmax(axis=1)).sum())
        places = np.arange(len(rows.targets))
        nats -= float(found[places, rows.targets].sum())
        teacher_nats -= float(wanted[places, rows.targets].sum())
        if teacher.delta is not None:
            del found
            moved.append(_divergence(wanted, log_softmax(stream.logits(draft.base, rows.bare))))
    divergence = np.concatenate(divergences)
    tokens = len(divergence)
    return Comparison(
        tokens=tokens,
        kl_mean=float(divergence.mean()),
        kl_p99=float(np.quantile(divergence, 0.99)),
        adapter_kl=float(np.concatenate(moved).mean()) if moved else 0.0,
        top1=agreed / tokens,
        perplexity=float(np.exp(min(nats / tokens, 700.0))),
        teacher_perplexity=float(np.exp(min(teacher_nats / tokens, 700.0))),
    )


@dataclass(frozen=True)
class _Rows:
    """Predictions that count.

    adapted, bare: final hidden states (P, H), as in Teacher. targets: the tokens that follow, (P,). found: logits (P, V).
    """

    adapted: Floats
    bare: Floats
    targets: NDArray[np.int64]
    found: Floats


def _gather_rows(teacher: Teacher, logits: Callable[[Sequence[int], int], Iterator[Floats]], positions: int) -> Iterator[_Rows]:
    """The predictions that count, in batches of about so many, across samples: each batch reads the whole head once."""
    waiting: list[_Rows] = []

    def join() -> _Rows:
        joined = [np.concatenate([getattr(rows, name) for rows in waiting]) for name in ("adapted", "bare", "targets", "found")]
        waiting.clear()
        return _Rows(*joined)

    for place, sample in enumerate(teacher.samples):
        start = 0
        for found in logits(sample.tokens[:-1], positions):
            stop = start + len(found)
            first = max(sample.start - 1, start)
            if first < stop:
                part, targets = slice(first, stop), np.array(sample.tokens[first + 1 : stop + 1])
                counted = found[first - start :].copy()
                waiting.append(_Rows(teacher.adapted[place][part], teacher.bare[place][part], targets, counted))
            start = stop
            if sum(len(rows.targets) for rows in waiting) >= positions:
                yield join()
    if waiting:
        yield join()


def log_softmax(logits: Floats) -> Doubles:
    """Log probabilities (T, V) in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def _divergence(wanted: Doubles, found: Doubles) -> Doubles:
    """KL(wanted ‖ found) per row, in nats."""
    divergence: Doubles = (np.exp(wanted) * (wanted - found)).sum(axis=1)
    return divergence


def _compare_product(draft: Draft, name: str, linear: Linear, plain: Floats, changed: Floats, inputs: Floats) -> ProductFidelity:
    """One product's figures. plain, changed: the base's weight (N, K) without and with the delta; inputs (T, K)."""
    stored = load_matrix(draft.folder, linear.name, draft.weights_of(name), linear.columns)
    delta = changed - plain
    if not isinstance(stored, BlockQuantized):
        return ProductFidelity(bits=32, retention=1.0, codes_changed=1.0, noise=0.0)
    values = stored.dequantize()
    before = None if draft.bare is None else load_matrix(draft.folder, linear.name, draft.bare, linear.columns)
    if not isinstance(before, BlockQuantized) or before.grid != stored.grid:
        before = quantize_rtn(plain, bits=stored.bits, block_size=stored.block_size, symmetric=stored.zero_points is None)
    size = float(np.vdot(delta, delta))
    effect = output_error(delta, inputs)
    noise = output_error(values - changed, inputs)
    return ProductFidelity(
        bits=stored.bits,
        retention=float(np.vdot(values - before.dequantize(), delta)) / size if size else 1.0,
        codes_changed=stored.share_changed(before),
        noise=float(np.sqrt(noise / effect)) if effect else 0.0,
    )
