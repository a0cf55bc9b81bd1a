"""How much of an adapter a quantized variant keeps: product by product in its weights, and in what onnxruntime says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelora_export.gptq import output_error
from edgelora_export.int4 import BlockQuantized, quantize_rtn
from edgelora_export.layer_stream import LayerStream, embed, read_layer
from edgelora_export.store import load_matrix, read_linear, touches
from edgelora_runtime.manifest import ProductFidelity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from edgelora_export.base import Base
    from edgelora_export.calibration import Sample
    from edgelora_export.decoder import Decoder, Linear
    from edgelora_export.draft import Draft
    from edgelora_export.variants import Delta

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

_LOGITS_BYTES = 1 << 26  # of one float64 array of logits, several of which are alive at once


@dataclass(frozen=True)
class Said:
    """What the float base with a delta added has to say: final hidden states (T, H) per sample."""

    delta: Delta | None
    states: list[Floats]


@dataclass(frozen=True)
class Teacher:
    """The unmerged adapter on the float base, the bare float base, and the unmerged adapter on the base of its training.

    bare: None without an adapter. trained: None where that base is the float one or not known.
    """

    samples: Sequence[Sample]
    adapted: Said
    bare: Said | None
    trained: Said | None
    products: dict[str, ProductFidelity]


@dataclass(frozen=True)
class Comparison:
    """A variant as onnxruntime runs it, against its teacher, over the predictions that count.

    kl_mean, kl_p99: KL(teacher ‖ variant) in nats per token, mean and 99th percentile. adapter_kl: KL(teacher ‖ bare float
    base), what the adapter changes; 0 without an adapter. top1: share of tokens with the same most likely token.
    perplexity, teacher_perplexity: of the samples' own tokens. trained_kl: as kl_mean, with the unmerged adapter on the base
    of its training in the teacher's place; None where that is the float one or not known.
    """

    tokens: int
    kl_mean: float
    kl_p99: float
    adapter_kl: float
    top1: float
    perplexity: float
    teacher_perplexity: float
    trained_kl: float | None


def run_teacher(draft: Draft, name: str, on_layer: Callable[[int], None] = lambda index: None) -> Teacher:
    """Streams a variant's held-out samples through the float base with and without its delta, and through its trained base.

    On the way each product of a merged variant is compared with the weight that it stands for.
    """
    variant, decoder = draft.variants[name], draft.decoder
    samples = draft.calibration_of(name).held_out
    stream = LayerStream(decoder)
    if variant.delta is None:
        return Teacher(samples, Said(None, stream.final_states(draft.base, samples, None, on_layer)), None, None, {})
    bare = embed(draft.base, decoder, samples)
    adapted = embed(draft.base, decoder, samples, variant.delta)
    products: dict[str, ProductFidelity] = {}
    for index, layer in enumerate(decoder.layers):
        on_layer(index)
        plain = read_layer(draft.base, decoder, index, None)
        own = [linear for linear in layer.linears if variant.live is None and touches(variant.delta, linear)]
        inputs: dict[str, list[Floats]] = {linear.name: [] for linear in own}
        tuned = read_layer(draft.base, decoder, index, variant.delta)
        adapted = stream.run(index, tuned, adapted, {product: seen.append for product, seen in inputs.items()})
        bare = stream.run(index, plain, bare)
        for linear in own:
            seen = np.concatenate(inputs.pop(linear.name))
            products[linear.name] = _compare_product(draft, name, linear, plain[linear.name], tuned[linear.name], seen)
    trained = None
    if variant.trained is not None:
        unmerged = variant.trained.unmerged
        trained = Said(unmerged, stream.final_states(draft.base, samples, unmerged))
    return Teacher(samples, Said(variant.delta, adapted), Said(None, bare), trained, products)


def measure_loss(base: Base, decoder: Decoder, samples: Sequence[Sample], delta: Delta) -> float:
    """The float base's loss on samples with a delta added, in nats per token."""
    stream = LayerStream(decoder)
    said = Said(delta, stream.final_states(base, samples, delta))
    nats, tokens = 0.0, 0
    for rows in _gather_rows(samples, _say_nothing, decoder.vocab_size):
        found = _predict(stream, base, said, rows)
        nats -= float(found[np.arange(len(rows.targets)), rows.targets].sum())
        tokens += len(rows.targets)
    return nats / tokens


def compare(draft: Draft, teacher: Teacher, logits: Callable[[Sequence[int], int], Iterator[Floats]]) -> Comparison:
    """Compares a variant with its teacher.

    logits: from token ids and a number of positions, the variant's logits float32 (P, V) of that many at a time.
    """
    stream = LayerStream(draft.decoder)
    divergences: list[Doubles] = []
    moved: list[Doubles] = []
    from_trained: list[Doubles] = []
    agreed, nats, teacher_nats = 0, 0.0, 0.0
    for rows in _gather_rows(teacher.samples, logits, draft.decoder.vocab_size):
        wanted, found = _predict(stream, draft.base, teacher.adapted, rows), log_softmax(rows.found)
        divergences.append(_divergence(wanted, found))
        if teacher.bare is not None:
            moved.append(_divergence(wanted, _predict(stream, draft.base, teacher.bare, rows)))
        if teacher.trained is not None:
            from_trained.append(_divergence(_predict(stream, draft.base, teacher.trained, rows), found))
        agreed += int((wanted.argmax(axis=1) == found.argmax(axis=1)).sum())
        places = np.arange(len(rows.targets))
        nats -= float(found[places, rows.targets].sum())
        teacher_nats -= float(wanted[places, rows.targets].sum())
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
        trained_kl=float(np.concatenate(from_trained).mean()) if from_trained else None,
    )


@dataclass(frozen=True)
class _Rows:
    """Predictions that count: positions (sample, slice), the tokens that follow (P,), and a variant's logits (P, V)."""

    positions: list[tuple[int, slice]]
    targets: NDArray[np.int64]
    found: Floats


def _gather_rows(
    samples: Sequence[Sample], logits: Callable[[Sequence[int], int], Iterator[Floats]], vocabulary: int
) -> Iterator[_Rows]:
    """The predictions that count, as many at a time as memory has room for: each batch reads the whole head once."""
    count = max(1, _LOGITS_BYTES // (8 * vocabulary))
    waiting: list[tuple[tuple[int, slice], NDArray[np.int64], Floats]] = []

    def join() -> _Rows:
        positions, targets, found = zip(*waiting, strict=True)
        waiting.clear()
        return _Rows(list(positions), np.concatenate(targets), np.concatenate(found))

    for place, sample in enumerate(samples):
        start = 0
        for found in logits(sample.tokens[:-1], count):
            stop = start + len(found)
            first = max(sample.start - 1, start)
            if first < stop:
                targets = np.array(sample.tokens[first + 1 : stop + 1], np.int64)
                waiting.append(((place, slice(first, stop)), targets, found[first - start :].copy()))
            start = stop
            if sum(len(targets) for _, targets, _ in waiting) >= count:
                yield join()
    if waiting:
        yield join()


def _say_nothing(tokens: Sequence[int], count: int) -> Iterator[Floats]:
    """Logits of no vocabulary, where no variant is asked."""
    for start in range(0, len(tokens), count):
        yield np.empty((min(count, len(tokens) - start), 0), np.float32)


def _predict(stream: LayerStream, base: Base, said: Said, rows: _Rows) -> Doubles:
    """Log probabilities (P, V) of the rows' predictions."""
    chosen = np.concatenate([said.states[place][part] for place, part in rows.positions])
    return log_softmax(stream.logits(base, chosen, said.delta))


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


def _compare_product(draft: Draft, name: str, linear: Linear, plain: Floats, tuned: Floats, inputs: Floats) -> ProductFidelity:
    """One product's figures. plain, tuned: the float base's weight (N, K) without and with the delta; inputs (T, K)."""
    stored = load_matrix(draft.folder, linear.name, draft.weights_of(name), linear.columns)
    variant = draft.variants[name]
    merged = tuned if variant.change is variant.delta else read_linear(draft.base, linear, variant.change)
    delta = merged - plain
    if not isinstance(stored, BlockQuantized):
        return ProductFidelity(bits=32, retention=1.0, codes_changed=1.0, noise=0.0)
    values = stored.dequantize()
    before = None if draft.bare is None else load_matrix(draft.folder, linear.name, draft.bare, linear.columns)
    if not isinstance(before, BlockQuantized) or before.grid != stored.grid:
        before = quantize_rtn(plain, bits=stored.bits, block_size=stored.block_size, symmetric=stored.zero_points is None)
    size = float(np.vdot(delta, delta))
    effect = output_error(tuned - plain, inputs)
    noise = output_error(values - merged, inputs)
    return ProductFidelity(
        bits=stored.bits,
        retention=float(np.vdot(values - before.dequantize(), delta)) / size if size else 1.0,
        codes_changed=stored.share_changed(before),
        noise=float(np.sqrt(noise / effect)) if effect else 0.0,
    )
