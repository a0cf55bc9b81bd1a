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
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgelora_export.base import Base
    from edgelora_export.calibration import Sample
    from edgelora_export.decoder import Decoder, Linear
    from edgelora_export.draft import Draft
    from edgelora_export.variants import Delta

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

_TOGETHER = 256  # positions whose teacher logits are computed at once


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


def run_teacher(draft: Draft, name: str) -> Teacher:
    """Streams a variant's held-out samples through the float base with and without its delta, and through its trained base.

    On the way each product of a merged variant is compared with the weight that it stands for.
    """
    variant, decoder = draft.variants[name], draft.decoder
    samples = variant.calibration.held_out if variant.delta is not None else draft.base_calibration.held_out
    stream = LayerStream(decoder)
    if variant.delta is None:
        return Teacher(samples, Said(None, stream.final_states(draft.base, samples, None)), None, None, {})
    bare = embed(draft.base, decoder, samples)
    adapted = embed(draft.base, decoder, samples, variant.delta)
    products: dict[str, ProductFidelity] = {}
    for index, layer in enumerate(decoder.layers):
        plain = read_layer(draft.base, decoder, index, None)
        inputs: dict[str, list[Floats]] = {linear.name: [] for linear in layer.linears}

        def keep(linear: Linear, tapped: Floats, inputs: dict[str, list[Floats]] = inputs) -> None:
            inputs[linear.name].append(tapped)

        tuned = read_layer(draft.base, decoder, index, variant.delta)
        adapted = stream.run(index, tuned, adapted, keep)
        bare = stream.run(index, plain, bare)
        for linear in layer.linears:
            if variant.live is None and touches(variant.delta, linear):
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
    for group in _group(samples):
        found, targets = _predict(stream, base, samples, said, group), _targets(samples, group)
        nats -= float(found[np.arange(len(targets)), targets].sum())
        tokens += len(targets)
    return nats / tokens


def compare(draft: Draft, teacher: Teacher, logits: Callable[[Sequence[int]], Floats]) -> Comparison:
    """Compares a variant's logits, given by a function from token ids to float32 (T, V), with its teacher's."""
    stream = LayerStream(draft.decoder)
    samples = teacher.samples
    divergences: list[Doubles] = []
    moved: list[Doubles] = []
    from_trained: list[Doubles] = []
    agreed, nats, teacher_nats = 0, 0.0, 0.0
    for group in _group(samples):
        targets = _targets(samples, group)
        wanted = _predict(stream, draft.base, samples, teacher.adapted, group)
        found = log_softmax(np.concatenate([logits(samples[item].tokens[:-1])[_counted(samples[item])] for item in group]))
        divergences.append(_divergence(wanted, found))
        if teacher.bare is not None:
            moved.append(_divergence(wanted, _predict(stream, draft.base, samples, teacher.bare, group)))
        if teacher.trained is not None:
            from_trained.append(_divergence(_predict(stream, draft.base, samples, teacher.trained, group), found))
        agreed += int((wanted.argmax(axis=1) == found.argmax(axis=1)).sum())
        places = np.arange(len(targets))
        nats -= float(found[places, targets].sum())
        teacher_nats -= float(wanted[places, targets].sum())
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


def _counted(sample: Sample) -> slice:
    """The positions of a sample whose predictions count."""
    return slice(sample.start - 1, len(sample.tokens) - 1)


def _targets(samples: Sequence[Sample], group: Sequence[int]) -> NDArray[np.int64]:
    """The tokens that a group's predictions are about."""
    return np.concatenate([np.array(samples[item].tokens[samples[item].start :], np.int64) for item in group])


def _predict(stream: LayerStream, base: Base, samples: Sequence[Sample], said: Said, group: Sequence[int]) -> Doubles:
    """Log probabilities (T, V) of the predictions of a group that count."""
    chosen = np.concatenate([said.states[item][_counted(samples[item])] for item in group])
    return log_softmax(stream.logits(base, chosen, said.delta))


def _group(samples: Sequence[Sample]) -> list[list[int]]:
    """Indices of samples, gathered until their predictions fill a batch."""
    groups: list[list[int]] = [[]]
    size = 0
    for item, sample in enumerate(samples):
        size += len(sample.tokens) - sample.start
        groups[-1].append(item)
        if size >= _TOGETHER and item + 1 < len(samples):
            groups.append([])
            size = 0
    return groups


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
