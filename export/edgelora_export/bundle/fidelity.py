"""Measures how much of an adapter a quantized variant keeps, in each product's weights and in the logits of onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelora_export.plan.adapted_decoder import changes_vocab
from edgelora_export.quantize.gptq import output_error, shorten_inputs
from edgelora_export.quantize.int4 import BlockQuantized, quantize_rtn
from edgelora_export.stream.layer_stream import LayerStream, embed, read_layer
from edgelora_export.weights.merged import changes_bias, changes_linear, read_bias, read_linear
from edgelora_export.weights.stored import load_matrix
from edgelora_runtime.bundle.manifest import ProductFidelity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora_export.base.base import Base
    from edgelora_export.decoder.description import Decoder, Linear
    from edgelora_export.plan.calibration import Sample
    from edgelora_export.plan.variants import Delta, Variant
    from edgelora_export.weights.stored import StoredWeights

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Logits = Callable[[Sequence[int], int], Iterator[Floats]]

LOGITS_BYTES = 1 << 25  # of one array of logits. The variant and each of its teachers hold one at the same time
_FLOAT64_VALUES = 1 << 20  # compared in float64 at a time, unless one row has more


@dataclass(frozen=True)
class Subject:
    """A variant to measure, and the place of its weights.

    decoder: the variant's own. samples: held-out samples. weights: the variant's, stored in folder. bare: the bare base's, None
    if they are not stored.
    """

    base: Base
    decoder: Decoder
    variant: Variant
    samples: Sequence[Sample]
    folder: Path
    weights: StoredWeights
    bare: StoredWeights | None


@dataclass(frozen=True)
class HiddenStates:
    """The final hidden states (T, H), one array per sample, of the float base with a delta added."""

    delta: Delta | None
    states: list[Floats]


@dataclass(frozen=True)
class Teacher:
    """The reference of a variant: the unmerged adapter on the float base.

    bare: the bare float base, None without an adapter. trained: the unmerged adapter on the base on which it was trained, None if
    that is the float one or unknown. products: figures of the products of a merged variant, by name.
    """

    adapted: HiddenStates
    bare: HiddenStates | None
    trained: HiddenStates | None
    products: dict[str, ProductFidelity]


@dataclass(frozen=True)
class Comparison:
    """A variant as onnxruntime runs it, compared with its teacher over the predictions that count.

    kl_mean, kl_p99: KL(teacher ‖ variant) in nats per token, mean and 99th percentile.
    adapter_kl: KL(teacher ‖ bare float base), the effect of the adapter. It is 0 without an adapter.
    top1: share of tokens with the same most likely token. perplexity, teacher_perplexity: of the samples' own tokens.
    answers: samples that the teacher would write itself, each of whose tokens is its most likely one. answers_kept: how many of
    these the variant would write too. One wrong token in a hundred is a wrong answer in four where answers have thirty tokens.
    trained_kl: mean KL as kl_mean, but against the unmerged adapter on the base on which it was trained. None if that is the
    float one or unknown.
    """

    tokens: int
    kl_mean: float
    kl_p99: float
    adapter_kl: float
    top1: float
    answers: int
    answers_kept: int
    perplexity: float
    teacher_perplexity: float
    trained_kl: float | None

    @property
    def retention(self) -> float | None:
        """The share of the adapter's effect that is left, 1 for all of it, 0 for the bare float base. None without an adapter."""
        return 1 - self.kl_mean / self.adapter_kl if self.adapter_kl > 0 else None

    @property
    def answers_share(self) -> float | None:
        """The share of the teacher's own answers that the variant would write too. None if the teacher would write none."""
        return self.answers_kept / self.answers if self.answers else None


def run_teacher(subject: Subject, on_layer: Callable[[int], None] = lambda index: None) -> Teacher:
    """Runs the samples through the float base with and without the variant's delta, and through its trained base.

    The bare base gets as many vocabulary rows as the variant has, of which those that it lacks are 0.
    Each product of a merged variant is compared on the way with the float weight that it replaces.
    """
    base, decoder, variant, samples = subject.base, subject.decoder, subject.variant, subject.samples
    stream = LayerStream(decoder)
    if variant.delta is None:
        return Teacher(HiddenStates(None, stream.final_states(base, samples, None, on_layer)), None, None, {})
    bare = embed(base, decoder, samples)
    adapted = embed(base, decoder, samples, variant.reference)
    products: dict[str, ProductFidelity] = {}
    for index in range(len(decoder.layers)):
        on_layer(index)
        adapted, bare, compared = _run_layer(subject, stream, index, adapted, bare)
        products |= compared
    trained = None
    if variant.trained is not None:
        unmerged = variant.trained.unmerged
        trained = HiddenStates(unmerged, stream.final_states(base, samples, unmerged))
    return Teacher(HiddenStates(variant.reference, adapted), HiddenStates(None, bare), trained, products)


def _run_layer(
    subject: Subject, stream: LayerStream, index: int, adapted: list[Floats], bare: list[Floats]
) -> tuple[list[Floats], list[Floats], dict[str, ProductFidelity]]:
    """Runs one layer with and without the variant's delta. Returns both hidden states and the figures of the layer's products."""
    variant, layer = subject.variant, subject.decoder.layers[index]
    assert variant.delta is not None
    bare_weights = read_layer(subject.base, subject.decoder, index, None)
    changed = [linear for linear in layer.linears if changes_linear(variant.delta, linear)]
    biased = [linear for linear in layer.linears if changes_bias(variant.delta, linear)]
    adapted_weights = bare_weights | {
        linear.name: read_linear(subject.base, linear, variant.reference)
        for linear in layer.linears
        if changes_linear(variant.reference, linear)
    }
    adapted_weights |= {f"{linear.name}.bias": read_bias(subject.base, linear, variant.delta) for linear in biased}
    inputs: dict[str, list[Floats]] = {linear.name: [] for linear in changed if variant.live is None}
    adapted = stream.run(index, adapted_weights, adapted, {product: seen.append for product, seen in inputs.items()})
    bare = stream.run(index, bare_weights, bare)
    products = {}
    for linear in changed if inputs else ():
        seen = np.concatenate(inputs.pop(linear.name))
        weights = bare_weights[linear.name], adapted_weights[linear.name]
        products[linear.name] = _compare_product(subject, linear, *weights, seen)
    return adapted, bare, products


def measure_loss(base: Base, decoder: Decoder, samples: Sequence[Sample], delta: Delta) -> float:
    """Measures the loss of the float base on samples with a delta added, in nats per token.

    decoder: adapted to the delta.
    """
    stream = LayerStream(decoder)
    states = HiddenStates(delta, stream.final_states(base, samples, delta))
    nats, tokens = 0.0, 0
    for rows in _gather_rows(samples, _skip_logits, decoder.vocab_size, LOGITS_BYTES):
        (logits,) = _predict(stream, base, decoder, [states], rows)
        for part in _split_rows(logits):
            nats -= float(_pick_targets(log_softmax(logits[part]), rows.targets[part]).sum())
        tokens += len(rows.targets)
    return nats / tokens


def compare(subject: Subject, teacher: Teacher, logits: Logits, *, batch_bytes: int = LOGITS_BYTES) -> Comparison:
    """Compares a variant with its teacher.

    logits: takes token ids and a number of positions P, and yields the variant's logits, float32 (P, V), for P positions
    at a time. batch_bytes: of the logits that are compared at once. Larger batches read the teachers' head less often.
    """
    base, decoder = subject.base, subject.decoder
    stream = LayerStream(decoder)
    teachers = [states for states in (teacher.adapted, teacher.bare, teacher.trained) if states is not None]
    divergences: list[Doubles] = []
    adapter_divergences: list[Doubles] = []
    from_trained: list[Doubles] = []
    missed: set[int] = set()  # places of samples that the teacher would not write
    lost: set[int] = set()  # and of those that the variant would not
    agreed, nats, teacher_nats = 0, 0.0, 0.0
    for rows in _gather_rows(subject.samples, logits, decoder.vocab_size, batch_bytes):
        predicted = _predict(stream, base, decoder, teachers, rows)
        for part in _split_rows(rows.found):
            found, wanted, *others = (log_softmax(each[part]) for each in (rows.found, *predicted))
            divergences.append(_kl_divergence(wanted, found))
            if teacher.bare is not None:
                adapter_divergences.append(_kl_divergence(wanted, others[0]))
            if teacher.trained is not None:
                from_trained.append(_kl_divergence(others[-1], found))
            said, own, targets, places = found.argmax(axis=1), wanted.argmax(axis=1), rows.targets[part], rows.places[part]
            agreed += int((own == said).sum())
            missed.update(places[own != targets].tolist())
            lost.update(places[said != targets].tolist())
            nats -= float(_pick_targets(found, targets).sum())
            teacher_nats -= float(_pick_targets(wanted, targets).sum())
        del predicted  # frees these logits before the next batch makes its own
    divergence = np.concatenate(divergences)
    tokens = len(divergence)
    written = set(range(len(subject.samples))) - missed
    return Comparison(
        tokens=tokens,
        kl_mean=float(divergence.mean()),
        kl_p99=float(np.quantile(divergence, 0.99)),
        adapter_kl=float(np.concatenate(adapter_divergences).mean()) if adapter_divergences else 0.0,
        top1=agreed / tokens,
        answers=len(written),
        answers_kept=len(written - lost),
        perplexity=float(np.exp(min(nats / tokens, 700.0))),
        teacher_perplexity=float(np.exp(min(teacher_nats / tokens, 700.0))),
        trained_kl=float(np.concatenate(from_trained).mean()) if from_trained else None,
    )


@dataclass(frozen=True)
class _Rows:
    """Predictions that count: their positions (sample, slice), the tokens that follow (P,), and a variant's logits (P, V)."""

    positions: list[tuple[int, slice]]
    targets: NDArray[np.int64]
    found: Floats

    @property
    def places(self) -> NDArray[np.int64]:
        """The sample of each prediction (P,), as its place among the samples."""
        return np.repeat([place for place, _ in self.positions], [part.stop - part.start for _, part in self.positions])


def _gather_rows(samples: Sequence[Sample], logits: Logits, vocabulary: int, batch_bytes: int) -> Iterator[_Rows]:
    """Gathers the predictions that count, in batches of at most so many bytes of logits.

    Each batch overwrites the logits of the previous one.
    """
    count = max(1, batch_bytes // (4 * vocabulary))
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


def _skip_logits(tokens: Sequence[int], count: int) -> Iterator[Floats]:
    """Yields logits over an empty vocabulary, for a loss that no variant is compared with."""
    for start in range(0, len(tokens), count):
        yield np.empty((min(count, len(tokens) - start), 0), np.float32)


def _predict(stream: LayerStream, base: Base, decoder: Decoder, teachers: Sequence[HiddenStates], rows: _Rows) -> list[Floats]:
    """Computes the logits (P, V) of the rows' predictions by each teacher.

    The head is read once for all teachers, unless a teacher's delta changes a vocabulary matrix.
    """
    chosen = [np.concatenate([teacher.states[place][part] for place, part in rows.positions]) for teacher in teachers]
    if any(changes_vocab(teacher.delta, decoder) for teacher in teachers):
        return [stream.logits(base, states, teacher.delta) for teacher, states in zip(teachers, chosen, strict=True)]
    return np.split(stream.logits(base, np.concatenate(chosen)), len(teachers))


def _split_rows(logits: Floats) -> Iterator[slice]:
    """Splits the rows of logits (P, V) into parts that are small enough for float64."""
    count = max(1, _FLOAT64_VALUES // max(1, logits.shape[1]))
    return (slice(start, start + count) for start in range(0, len(logits), count))


def _pick_targets(predicted: Doubles, targets: NDArray[np.int64]) -> Doubles:
    """Returns the log probability of each row's own token (P,)."""
    picked: Doubles = predicted[np.arange(len(targets)), targets]
    return picked


def log_softmax(logits: Floats) -> Doubles:
    """Computes log probabilities (T, V) in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def _kl_divergence(wanted: Doubles, found: Doubles) -> Doubles:
    """Computes KL(wanted ‖ found) per row, in nats."""
    divergence: Doubles = (np.exp(wanted) * (wanted - found)).sum(axis=1)
    return divergence


def _compare_product(subject: Subject, linear: Linear, bare: Floats, adapted: Floats, inputs: Floats) -> ProductFidelity:
    """Compares a stored product with the weight that it replaces.

    bare, adapted: the float base's weight (N, K) without and with the delta. inputs: (T, K).
    """
    stored = load_matrix(subject.folder, linear.name, subject.weights, linear.columns)
    variant = subject.variant
    merged = adapted if variant.change is variant.delta else read_linear(subject.base, linear, variant.change)
    delta = merged - bare
    if not isinstance(stored, BlockQuantized):
        return ProductFidelity(bits=32, delta_projection=1.0, codes_changed=1.0, noise=0.0)
    values = stored.dequantize()
    before = None if subject.bare is None else load_matrix(subject.folder, linear.name, subject.bare, linear.columns)
    if not isinstance(before, BlockQuantized) or before.grid != stored.grid:
        before = quantize_rtn(bare, bits=stored.bits, block_size=stored.block_size, symmetric=stored.zero_points is None)
    size = float(np.vdot(delta, delta))
    inputs = shorten_inputs(inputs, len(values))
    effect = output_error(adapted - bare, inputs)
    noise = output_error(values - merged, inputs)
    return ProductFidelity(
        bits=stored.bits,
        delta_projection=float(np.vdot(values - before.dequantize(), delta)) / size if size else 1.0,
        codes_changed=stored.share_changed(before),
        noise=float(np.sqrt(noise / effect)) if effect else 0.0,
    )
