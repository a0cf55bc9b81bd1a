"""The router's arithmetic against the formulas of docs/reference/bundle-format.md, and broken router files."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from edgelora_runtime.bundle.manifest import RouterClass, RouterEntry
from edgelora_runtime.bundle.router import ROUTER, Router, count_ngrams, find_last_request
from edgelora_runtime.errors import IntegrityError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BUCKETS = 1 << 8
TEXTS = st.text(max_size=60) | st.text("ab \n\tÄ🙂\ud800", max_size=60)
# Published with FNV's reference implementation: http://www.isthe.com/chongo/src/fnv/test_fnv.c
PUBLISHED = {b"foo": 0xA9F37ED7, b"foob": 0x3F5076EF, b"fooba": 0x39AAA18A}
# Of "Foo foo\tÄ" in 2^14 buckets.
GOLDEN_BUCKETS = [
    1604,
    1700,
    1779,
    2556,
    3986,
    4435,
    5156,
    5673,
    6426,
    6973,
    7062,
    7323,
    8415,
    11924,
    13301,
    13350,
    13823,
    14190,
    14223,
    14700,
    15764,
]
GOLDEN_VALUES = [
    0.182354,
    0.182354,
    0.182354,
    0.289024,
    0.182354,
    0.182354,
    0.182354,
    0.182354,
    0.289024,
    0.182354,
    0.289024,
    0.182354,
    0.289024,
    0.182354,
    0.289024,
    0.182354,
    0.182354,
    0.182354,
    0.289024,
    0.182354,
    0.182354,
]


def fnv1a(word: bytes) -> int:
    found = 2166136261
    for byte in word:
        found = (found ^ byte) * 16777619 % 2**32
    return found


def fold(found: int, buckets: int) -> int:
    return (found ^ found >> int(math.log2(buckets))) % buckets


def reference_ngrams(text: str, buckets: int) -> dict[int, float]:
    """The specification, applied to one n-gram after the other."""
    words = text.encode(errors="replace").lower().split()
    spaced = b" " + b" ".join(words) + b" "
    grams = [spaced[start : start + length] for length in (3, 4, 5) for start in range(len(spaced) - length + 1)]
    counts = Counter(fold(fnv1a(gram), buckets) for gram in grams)
    logs = {bucket: math.log(1 + count) for bucket, count in sorted(counts.items())}
    length = math.sqrt(sum(value**2 for value in logs.values()))
    return {bucket: value / length for bucket, value in logs.items()}


def entry(*variants: str | None, threshold: float = 0.0) -> RouterEntry:
    classes = tuple(RouterClass(variant, 10, 2, 1.0) for variant in variants)
    return RouterEntry(ROUTER, "bytes 3-5", classes, "base", threshold, 1.0)


def weights(classes: int, seed: int = 0, buckets: int = BUCKETS) -> NDArray[np.float16]:
    return np.random.default_rng(seed).normal(size=(classes, buckets)).astype(np.float16)


def pack(**tensors: Any) -> bytes:
    content: bytes = save({"weights": weights(3), "bias": np.zeros(3, np.float32), **tensors})
    return content


@pytest.mark.parametrize(("word", "published"), PUBLISHED.items())
def test_the_hash_is_fnv1a_as_published(word: bytes, published: int) -> None:
    assert fnv1a(word) == published
    buckets, _ = count_ngrams("fooba", 1 << 20)
    assert fold(published, 1 << 20) in buckets


def test_golden_values() -> None:
    """These must never change, since bundles rely on them."""
    buckets, values = count_ngrams("Foo foo\tÄ", 1 << 14)
    assert buckets.tolist() == GOLDEN_BUCKETS
    np.testing.assert_allclose(values, GOLDEN_VALUES, atol=1e-6)


@given(TEXTS, st.sampled_from([BUCKETS, 1 << 12]))
def test_ngrams_are_what_the_specification_says(text: str, buckets: int) -> None:
    found, values = count_ngrams(text, buckets)
    expected = reference_ngrams(text, buckets)
    assert found.tolist() == list(expected)
    np.testing.assert_allclose(values, list(expected.values()), rtol=1e-6)


@given(TEXTS, st.integers(1, 5), st.integers(0, 9))
def test_probabilities_are_the_softmax_of_a_linear_model(text: str, classes: int, seed: int) -> None:
    matrix, bias = weights(classes, seed), np.random.default_rng(seed).normal(size=classes).astype(np.float32)
    router = Router(entry(*map(str, range(classes))), matrix, bias)
    ngrams = reference_ngrams(text, BUCKETS)
    scores = [float(bias[c]) + sum(value * float(matrix[c, bucket]) for bucket, value in ngrams.items()) for c in range(classes)]
    expected = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
    np.testing.assert_allclose(router.probabilities(text), expected, rtol=1e-4)
    variant, confidence, fallback = router.pick(text)
    assert confidence == pytest.approx(max(expected), rel=1e-4)
    assert expected[int(variant)] == pytest.approx(max(expected), rel=1e-4)
    assert not fallback


def test_large_scores_do_not_overflow() -> None:
    router = Router(entry("a", "b"), np.full((2, BUCKETS), 6e4, np.float16), np.array([1e5, 0], np.float32))
    assert router.pick("any text") == ("a", 1.0, False)


def test_the_fallback_is_for_other_text_and_for_low_confidence() -> None:
    flat = np.zeros((3, BUCKETS), np.float16)
    assert Router(entry("a", "b", None), flat, np.array([0, 0, 1], np.float32)).pick("x")[::2] == ("base", True)
    bias = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    for threshold, expected in ((0.0, ("a", False)), (0.49, ("a", False)), (0.51, ("base", True))):
        variant, confidence, fallback = Router(entry("a", "b", None, threshold=threshold), flat, bias).pick("x")
        assert (variant, fallback) == expected
        assert confidence == pytest.approx(0.5, rel=1e-6)


def test_a_router_is_read_as_it_was_written() -> None:
    bias = np.array([0.5, -1, 2], np.float32)
    read = Router.read(pack(bias=bias), entry("a", "b", None))
    np.testing.assert_array_equal(
        read.probabilities("a text"), Router(entry("a", "b", None), weights(3), bias).probabilities("a text")
    )


def with_kind(kind: str, raw: bytes) -> bytes:
    """The same file with another type for the bias in its header."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["bias"]["dtype"] = kind
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a readable safetensors file"),
    "noise": (bytes(range(256)), "not a readable safetensors file"),
    "cut off": (pack()[:-1], "not a readable safetensors file"),
    "a type that numpy lacks": (with_kind("U32", pack())[:-1], "not a readable safetensors file"),
    "an unknown type": (with_kind("Q9", pack()), "not a readable safetensors file"),
    "another tensor": (pack(extra=np.zeros(1, np.float32)), "holds bias, extra, weights"),
    "no bias": (save({"weights": weights(3)}), "holds weights, not weights and bias"),
    "a class too few": (pack(weights=weights(2)), r"weights is float16 \(2, 256\), not float16 \(3, 256\)"),
    "biases of more classes": (pack(bias=np.zeros(4, np.float32)), r"bias is float32 \(4,\)"),
    "buckets that are no power of two": (pack(weights=weights(3, buckets=300)), "300 buckets"),
    "few buckets": (pack(weights=weights(3, buckets=128)), "128 buckets"),
    "many buckets": (pack(weights=np.zeros((3, 1 << 21), np.float16)), "2097152 buckets"),
    "no buckets": (pack(weights=np.zeros((3, 0), np.float16)), "0 buckets"),
    "a number": (pack(weights=np.zeros((), np.float16)), "0 buckets"),
    "three axes": (pack(weights=np.zeros((3, 1, 256), np.float16)), "weights is float16"),
    "weights in float32": (pack(weights=weights(3).astype(np.float32)), "weights is float32"),
    "whole numbers": (pack(bias=np.zeros(3, np.int32)), "bias is int32"),
    "not a number": (pack(weights=np.full((3, BUCKETS), np.nan, np.float16)), "weights holds values that are not finite"),
    "infinity": (pack(bias=np.array([0, np.inf, 0], np.float32)), "bias holds values that are not finite"),
}


@pytest.mark.parametrize(("raw", "mention"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_broken_router_is_refused(raw: bytes, mention: str) -> None:
    with pytest.raises(IntegrityError, match=mention) as caught:
        Router.read(raw, entry("a", "b", None))
    assert str(caught.value).startswith(ROUTER)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["BF16", "F8_E5M2", "F8_E4M3", "BOOL", "U64", "I8"])
def test_other_types_are_refused(kind: str) -> None:
    sizes = {"BF16": 2, "BOOL": 1, "U64": 8, "I8": 1}
    bias = np.zeros(3 * sizes.get(kind, 1), np.uint8)
    raw = with_kind(kind, pack(bias=bias))
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header["bias"]["shape"] = [3]
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text + raw[8 + int.from_bytes(raw[:8], "little") :]
    with pytest.raises(IntegrityError):
        Router.read(raw, entry("a", "b", None))


def test_a_conversation_is_routed_by_its_users_last_message() -> None:
    said = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "first"},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": "a"},
    ]
    assert find_last_request(said) == "second"
    assert find_last_request(said[:1]) == "s"
    parts = [{"type": "text", "text": "third"}, {"type": "text", "text": "line"}]
    assert find_last_request([*said, {"role": "user", "content": parts}]) == "third\nline"
    assert find_last_request([{"role": "user"}]) == ""
