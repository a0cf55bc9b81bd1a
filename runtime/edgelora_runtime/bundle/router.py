"""The router: a linear model over hashed n-grams that picks a variant for a prompt.

It hashes n-grams of the prompt's bytes, in plain numpy.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from edgelora_runtime.bundle.messages import join_parts
from edgelora_runtime.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgelora_runtime.bundle.folder import Bundle
    from edgelora_runtime.bundle.manifest import RouterEntry
    from edgelora_runtime.bundle.messages import Message

    Floats = NDArray[np.float32]

AUTO = "auto"  # in place of a variant's name: the router picks the variant
ROUTER = "router.safetensors"
_ROUTER_LIMIT = 64 << 20  # bytes of that file
_LENGTHS = (3, 4, 5)  # bytes of an n-gram
_BUCKETS = (1 << 8, 1 << 20)  # fewest and most; always a power of two
# 32-bit FNV-1a: http://www.isthe.com/chongo/tech/comp/fnv/#FNV-param
_FNV_BASIS, _FNV_PRIME = np.uint32(2166136261), np.uint32(16777619)


@dataclass(frozen=True)
class Route:
    """The variant that a prompt goes to.

    confidence: probability of the likeliest class, which is the variant's own unless this is a fallback. fallback: whether the
    prompt resembles none of the router's variants, or the confidence is below the bundle's threshold. milliseconds: time to route
    it. For a bundle's first prompt, this includes loading the router.
    """

    variant: str
    confidence: float
    fallback: bool
    milliseconds: float


class Router:
    """A linear classifier of texts. Safe to call from many threads.

    weights: float (classes, buckets), bias: float (classes,), in the order of the entry's classes.
    """

    def __init__(self, entry: RouterEntry, weights: NDArray[np.floating], bias: NDArray[np.floating]) -> None:
        self._entry = entry
        self._by_bucket = np.ascontiguousarray(weights.T, np.float32)
        self._bias = bias.astype(np.float64)

    @classmethod
    def read(cls, raw: bytes, entry: RouterEntry) -> Router:
        """Parses a router file. IntegrityError says what is wrong with it."""
        try:
            tensors = load(raw)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:  # the last three for types that numpy lacks
            raise IntegrityError(f"{entry.file} is not a readable safetensors file ({error})") from error
        if tensors.keys() != {"weights", "bias"}:
            raise IntegrityError(f"{entry.file} holds {', '.join(sorted(tensors)[:4]) or 'nothing'}, not weights and bias")
        weights, bias = tensors["weights"], tensors["bias"]
        buckets = weights.shape[-1] if weights.ndim else 0
        if buckets & (buckets - 1) or not _BUCKETS[0] <= buckets <= _BUCKETS[1]:
            raise IntegrityError(f"{entry.file} has {buckets} buckets, not a power of two from {_BUCKETS[0]} to {_BUCKETS[1]}")
        for name, tensor, shape, kind in (
            ("weights", weights, (len(entry.classes), buckets), np.float16),
            ("bias", bias, (len(entry.classes),), np.float32),
        ):
            if tensor.shape != shape or tensor.dtype != kind:
                raise IntegrityError(
                    f"{entry.file}: {name} is {tensor.dtype} {tensor.shape}, not {np.dtype(kind)} {shape} for the classes listed"
                )
            if not np.isfinite(tensor).all():
                raise IntegrityError(f"{entry.file}: {name} holds values that are not finite")
        return cls(entry, weights, bias)

    def probabilities(self, text: str) -> NDArray[np.float64]:
        """Returns the probability of each class for a text, float64 (classes,).

        Classes are in the order of the entry's.
        """
        buckets, values = count_ngrams(text, len(self._by_bucket))
        # einsum calls no BLAS, whose threads would compete with those of onnxruntime and cost more than they save.
        scores = self._bias + np.einsum("m,mc->c", values, self._by_bucket[buckets])
        likelihoods = np.exp(scores - scores.max())
        found: NDArray[np.float64] = likelihoods / likelihoods.sum()
        return found

    def pick(self, text: str) -> tuple[str, float, bool]:
        """Returns the variant, confidence and fallback of a text's Route."""
        likelihoods = self.probabilities(text)
        best = int(likelihoods.argmax())
        variant, confidence = self._entry.classes[best].variant, float(likelihoods[best])
        if variant is None or confidence < self._entry.threshold:
            return self._entry.fallback, confidence, True
        return variant, confidence, False


class LazyRouter:
    """A bundle's router, loaded for the first prompt that needs it."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._router: Router | None = None

    def route(self, text: str) -> Route:
        """Returns the route of a text. Raises UsageError if the bundle has no router."""
        started = time.perf_counter()
        picked = self._load().pick(text)
        return Route(*picked, milliseconds=(time.perf_counter() - started) * 1e3)

    def clear(self) -> None:
        """Frees the router. A later call loads it again."""
        self._router = None

    def _load(self) -> Router:
        entry = self._bundle.manifest.router
        if entry is None:
            raise UsageError(
                f"this bundle has no router for variant {AUTO!r}; export it with a [router] table in the recipe, "
                f"or name one of {', '.join(self._bundle.manifest.variants)}"
            )
        router = self._router
        if router is None:  # two threads may both load it; the results are equal
            router = self._router = Router.read(self._bundle.read(entry.file, limit=_ROUTER_LIMIT), entry)
        return router


def count_ngrams(text: str, buckets: int) -> tuple[NDArray[np.int64], Floats]:
    """Counts the n-grams of a text by bucket.

    Returns the buckets that occur, int64 (M,), ascending, and the weight of each, float32 (M,), of Euclidean length 1.
    docs/reference/bundle-format.md specifies both. Only ASCII is lower-cased: Unicode's tables differ between versions of
    Python.
    """
    words = text.encode(errors="replace").lower().split()
    spaced = np.frombuffer(b" %b " % b" ".join(words), np.uint8)
    hashes = np.full(len(spaced) + 1, _FNV_BASIS)
    found = []
    for length in range(1, _LENGTHS[-1] + 1):  # hashes[i]: the hash of bytes i to i + length
        hashes = (hashes[:-1] ^ spaced[length - 1 :]) * _FNV_PRIME
        if length in _LENGTHS:
            found.append(hashes)
        if len(hashes) == 1:
            break
    hashed = np.concatenate(found) if found else hashes[:0]
    folded = (hashed ^ (hashed >> np.uint32(buckets.bit_length() - 1))) & np.uint32(buckets - 1)
    counts = np.bincount(folded, minlength=buckets)
    occurring = np.flatnonzero(counts)
    values = np.log1p(counts[occurring]).astype(np.float32)
    return occurring, values / max(math.sqrt(float((values * values).sum())), 1e-30)


def find_last_request(messages: Sequence[Message]) -> str:
    """Returns the text that a conversation is routed by.

    It is the user's last message, or the last message if no user speaks. The messages are checked ones.
    """
    asked = [message for message in messages if message.get("role") == "user"] or messages
    return join_parts(asked[-1].get("content"))
