"""How much of an adapter a quantized variant keeps: product by product in its weights, and in what onnxruntime says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelora_export.quantize.gptq import output_error
from edgelora_export.quantize.int4 import BlockQuantized, quantize_rtn
from edgelora_export.stream.layer_stream import LayerStream, embed, read_layer
from edgelora_export.weights.store import load_matrix, read_linear, touches, touches_ends
from edgelora_runtime.bundle.manifest import ProductFidelity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from edgelora_export.bundle.draft import Draft
    from edgelora_export.decoder.description import Decoder, Linear
    from edgelora_export.plan.calibration import Sample
    from edgelora_export.plan.variants import Delta
    from edgelora_export.weights.base import Base

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

_LOGITS_BYTES = 1 << 25  # of one array of logits: the variant's, and one for each of its teachers, are alive at once
_WIDE = 1 << 20  # numbers that are compared in float64 at a time


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
    for index in range(len(decoder.layers)):
        on_layer(index)
        adapted, bare = _run_layer(draft, name, stream, index, adapted, bare, products)
    trained = None
    if variant.trained is not None:
        unmerged = variant.trained.unmerged
        trained = Said(unmerged, stream.final_states(draft.base, samples, unmerged))
    return Teacher(samples, Said(variant.delta, adapted), Said(None, bare), trained, products)


def _run_layer(
    draft: Draft,
    name: str,
    stream: LayerStream,
    index: int,
    adapted: list[Floats],
    bare: list[Floats],
    products: dict[str, ProductFidelity],
) -> tuple[list[Floats], list[Floats]]:
    """Takes the states with and without a variant's delta through a layer, and adds the figures of its products."""
    variant, layer = draft.variants[name], draft.decoder.layers[index]
    assert variant.delta is not None
    plain = read_layer(draft.base, draft.decoder, index, None)
    touched = [linear for linear in layer.linears if touches(variant.delta, linear)]
    tuned = plain | {linear.name: read_linear(draft.base, linear, variant.delta) for linear in touched}
    inputs: dict[str, list[Floats]] = {linear.name: [] for linear in touched if variant.live is None}
    adapted = stream.run(index, tuned, adapted, {product: seen.append for product, seen in inputs.items()})
    bare = stream.run(index, plain, bare)
    for linear in touched if inputs else ():
        seen = np.concatenate(inputs.pop(linear.name))
        products[linear.name] = _compare_product(draft, name, linear, plain[linear.name], tuned[linear.name], seen)
    return adapted, bare


def measure_loss(base: Base, decoder: Decoder, samples: Sequence[Sample], delta: Delta) -> float:
    """The float base's loss on samples with a delta added, in nats per token."""
    stream = LayerStream(decoder)
    said = Said(delta, stream.final_states(base, samples, delta))
    nats, tokens = 0.0, 0
    for rows in _gather_rows(samples, _say_nothing, decoder.vocab_size):
        (logits,) = _predict(stream, base, decoder, [said], rows)
        for part in _split(logits):
            nats -= float(_pick(log_softmax(logits[part]), rows.targets[part]).sum())
        tokens += len(rows.targets)
    return nats / tokens


def compare(draft: Draft, teacher: Teacher, logits: Callable[[Sequence[int], int], Iterator[Floats]]) -> Comparison:
    """Compares a variant with its teacher.

    logits: from token ids and a number of positions, the variant's logits float32 (P, V) of that many at a time.
    """
    stream = LayerStream(draft.decoder)
    saids = [said for said in (teacher.adapted, teacher.bare, teacher.trained) if said is not None]
    divergences: list[Doubles] = []
    moved: list[Doubles] = []
    from_trained: list[Doubles] = []
    agreed, nats, teacher_nats = 0, 0.0, 0.0
    for rows in _gather_rows(teacher.samples, logits, draft.decoder.vocab_size):
        predicted = _predict(stream, draft.base, draft.decoder, saids, rows)
        for part in _split(rows.found):
            found, wanted, *others = (log_softmax(each[part]) for each in (rows.found, *predicted))
            divergences.append(_divergence(wanted, found))
            if teacher.bare is not None:
                moved.append(_divergence(wanted, others[0]))
            if teacher.trained is not None:
                from_trained.append(_divergence(others[-1], found))
            agreed += int((wanted.argmax(axis=1) == found.argmax(axis=1)).sum())
            nats -= float(_pick(found, rows.targets[part]).sum())
            teacher_nats -= float(_pick(wanted, rows.targets[part]).sum())
        del predicted  # else the next batch's would be made beside it
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
    """The predictions that count, as many at a time as memory has room for: each batch reads the whole head once.

    A batch's logits are overwritten by the next one's.
    """
    count = max(1, _LOGITS_BYTES // (4 * vocabulary))
    room: Floats | None = None
    positions: list[tuple[int, slice]] = []
    targets: list[int] = []
    for place, sample in enumerate(samples):
        start = 0
        for found in logits(sample.tokens[:-1], count):
            if room is None:
                room = np.empty((count, found.shape[1]), np.float32)
            stop = start + len(found)
            first = max(sample.start - 1, start)
            while first < stop:
                filled = len(targets)
                last = min(stop, first + count - filled)
                room[filled : filled + last - first] = found[first - start : last - start]
                positions.append((place, slice(first, last)))
                targets += sample.tokens[first + 1 : last + 1]
                first = last
                if len(targets) == count:
                    yield _Rows(positions, np.array(targets, np.int64), room)
                    positions, targets = [], []
            start = stop
    if room is not None and targets:
        yield _Rows(positions, np.array(targets, np.int64), room[: len(targets)])


def _say_nothing(tokens: Sequence[int], count: int) -> Iterator[Floats]:
    """Logits of no vocabulary, where no variant is asked."""
    for start in range(0, len(tokens), count):
        yield np.empty((min(count, len(tokens) - start), 0), np.float32)


def _predict(stream: LayerStream, base: Base, decoder: Decoder, saids: Sequence[Said], rows: _Rows) -> list[Floats]:
    """Logits (P, V) of the rows' predictions, by each of those who have a say; the head is read once if it is all theirs."""
    chosen = [np.concatenate([said.states[place][part] for place, part in rows.positions]) for said in saids]
    if any(touches_ends(said.delta, decoder) for said in saids):
        return [stream.logits(base, states, said.delta) for said, states in zip(saids, chosen, strict=True)]
    return np.split(stream.logits(base, np.concatenate(chosen)), len(saids))


def _split(logits: Floats) -> Iterator[slice]:
    """Rows of logits (P, V), as many at a time as float64 has room for."""
    count = max(1, _WIDE // max(1, logits.shape[1]))
    return (slice(start, start + count) for start in range(0, len(logits), count))


def _pick(predicted: Doubles, targets: NDArray[np.int64]) -> Doubles:
    """The log probability of each row's own token (P,)."""
    picked: Doubles = predicted[np.arange(len(targets)), targets]
    return picked


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
