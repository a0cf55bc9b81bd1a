"""The decoder that a delta makes of the base's: with biases, a head or a vocabulary size of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgelora_export.decoder.description import HEAD_MODULE

if TYPE_CHECKING:
    from collections.abc import Set

    from edgelora_export.decoder.description import Decoder, Layer, Linear
    from edgelora_export.plan.variants import Delta


def adapt_decoder(decoder: Decoder, delta: Delta | None) -> Decoder:
    """Adapts a decoder to a delta. Returns the same object for a delta that changes only weights in place.

    Adapting an adapted decoder again changes nothing.

    The head is untied from the embedding if the delta changes one of the two and was trained with them apart, as PEFT does
    without ensure_weight_tying:
    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/config.py
    """
    if delta is None:
        return decoder
    changes_vocab = not delta.modules.isdisjoint({decoder.embedding.removesuffix(".weight"), HEAD_MODULE})
    untied = decoder.tied and changes_vocab and not delta.ties_vocab
    rows = decoder.vocab_size if delta.vocab_size is None else delta.vocab_size
    if untied or rows != decoder.vocab_size:
        decoder = replace(decoder, untied=decoder.untied or untied, vocab_size=rows)
    return add_biases(decoder, delta.biased)


def add_biases(decoder: Decoder, modules: Set[str]) -> Decoder:
    """Gives a bias to each product that the checkpoint stores without, if one of its modules is named."""
    layers = tuple(_add_biases(layer, modules) for layer in decoder.layers) if modules else decoder.layers
    return decoder if layers == decoder.layers else replace(decoder, layers=layers)


def find_vocab_module(decoder: Decoder, product: str, delta: Delta | None) -> str | None:
    """Finds the module by which a delta changes the `embedding` or the `head`. Returns None if it changes neither.

    decoder: adapted to the delta. A tied matrix may be named as either.
    """
    if delta is None:
        return None
    modules = [decoder.vocab_modules[product], *([HEAD_MODULE] if decoder.tied else [])]
    return next((module for module in modules if module in delta.modules), None)


def changes_vocab(delta: Delta | None, decoder: Decoder) -> bool:
    """True if a delta changes the embedding or the head."""
    return any(find_vocab_module(decoder, product, delta) is not None for product in decoder.vocab_modules)


def find_own_matrices(base: Decoder, decoder: Decoder, delta: Delta | None) -> list[str]:
    """Names the vocabulary matrices of an adapted decoder that are not the base's: `embedding`, `head`, both or none."""
    resized = decoder.vocab_size != base.vocab_size
    return [product for product in decoder.vocab_modules if resized or find_vocab_module(decoder, product, delta) is not None]


def explain_not_live(decoder: Decoder, delta: Delta | None) -> str | None:
    """Returns the reason a delta cannot run as factors on the base's graph, or None if only its factors may stand in the way."""
    if delta is None:
        return None
    if delta.biased:
        return f"it changes the bias of {min(delta.biased)}, and live adapters have no biases"
    if delta.vocab_size not in (None, decoder.vocab_size):
        return f"its vocabulary has {delta.vocab_size} tokens, and the base's {decoder.vocab_size}"
    if changes_vocab(delta, decoder):
        return "it changes the embedding or the head, which have no live inputs"
    return None


def _add_biases(layer: Layer, modules: Set[str]) -> Layer:
    def adapt(linear: Linear) -> Linear:
        added = not linear.bias and not modules.isdisjoint(linear.modules)
        return replace(linear, bias=True, new_bias=True) if added else linear

    return replace(layer, qkv=adapt(layer.qkv), output=adapt(layer.output), gate_up=adapt(layer.gate_up), down=adapt(layer.down))
