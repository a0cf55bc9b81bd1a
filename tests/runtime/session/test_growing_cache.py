"""Growing caches: a hand-written one-layer decoder in the runtime, against the same arithmetic in numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.parser import parse_model

from edgelora_runtime import IntegrityError, Runtime
from edgelora_runtime.bundle.folder import hash_file
from edgelora_runtime.bundle.manifest import (
    MANIFEST,
    BaseEntry,
    FileEntry,
    GraphEntry,
    Manifest,
    ModelEntry,
    QuantizationEntry,
    VariantEntry,
)
from edgelora_runtime.session.model import PREFILL_CHUNK, Model
from tests.tiny import make_tokenizer, random_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

TOLERANCE = 1e-4
VOCABULARY, HEADS, SIZE, CONTEXT = 300, 2, 4, 1200
ENTRY = ModelEntry("hand-made", HEADS * SIZE, 1, HEADS, SIZE, VOCABULARY, CONTEXT, (1,), "growing")

# The text format of graphs allows no dots in names.
NAMES = {f"{stem}_{kind}": f"{stem}.0.{kind}" for stem in ("past_key_values", "present") for kind in ("key", "value")}
# One layer of attention and a head; each token's key and value are appended to those before.
GRAPH = """
<ir_version: 10, opset_import: ["": 18]>
decoder (int64[1, S] input_ids, int64[1, T] attention_mask, int64[1] logits_to_keep,
         float[1, 2, P, 4] past_key_values_key, float[1, 2, P, 4] past_key_values_value)
     => (float[1, kept, 300] logits, float[1, 2, T, 4] present_key, float[1, 2, T, 4] present_value)
<int64[1] logits_to_keep = {0}, int64[4] split = {1, -1, 2, 4}, int64[3] merge = {1, -1, 8}, int64[1] end = {9223372036854775807},
 int64[1] axis = {1}, int64[1] first = {0}, int64 zero = {0}, int64 one = {1}, float low = {-1e9}, float half = {0.5}>
{
    x = Gather (embedding, input_ids)
    xq = MatMul (x, query)
    xk = MatMul (x, key)
    xv = MatMul (x, value)
    sq = Reshape (xq, split)
    sk = Reshape (xk, split)
    sv = Reshape (xv, split)
    q = Transpose <perm = [0, 2, 1, 3]> (sq)
    k = Transpose <perm = [0, 2, 1, 3]> (sk)
    v = Transpose <perm = [0, 2, 1, 3]> (sv)
    present_key = Concat <axis = 2> (past_key_values_key, k)
    present_value = Concat <axis = 2> (past_key_values_value, v)
    kt = Transpose <perm = [0, 1, 3, 2]> (present_key)
    raw = MatMul (q, kt)
    scores = Mul (raw, half)
    mask_shape = Shape (attention_mask)
    ids_shape = Shape (input_ids)
    total = Gather (mask_shape, one)
    count = Gather (ids_shape, one)
    start = Sub (total, count)
    keys = Range (zero, total, one)
    rows = Range (start, total, one)
    queries = Unsqueeze (rows, axis)
    seen = LessOrEqual (keys, queries)
    masked = Where (seen, scores, low)
    shares = Softmax <axis = -1> (masked)
    mixed = MatMul (shares, present_value)
    moved = Transpose <perm = [0, 2, 1, 3]> (mixed)
    merged = Reshape (moved, merge)
    from_end = Neg (logits_to_keep)
    kept = Slice (merged, from_end, end, axis)
    logits = MatMul (kept, head)
}
"""


@pytest.fixture(scope="module")
def weights() -> dict[str, Floats]:
    random = np.random.default_rng(0)
    hidden = HEADS * SIZE
    shapes = {"embedding": (VOCABULARY, hidden), "head": (hidden, VOCABULARY)}
    shapes |= dict.fromkeys(("query", "key", "value"), (hidden, hidden))
    return {name: random.normal(0, 0.8, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def bundle(weights: dict[str, Floats], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("growing")
    model = parse_graph()
    model.graph.initializer.extend(numpy_helper.from_array(weight, name) for name, weight in weights.items())
    onnx.save(model, folder / "base.cpu.onnx")
    make_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    manifest = Manifest(
        created_by="a test",
        default_variant="base",
        base=BaseEntry("base", "0" * 64),
        model=ENTRY,
        quantization=QuantizationEntry(32, 32, True, "none"),
        adapters={},
        live_slots=(),
        variants={"base": VariantEntry("merged", {}, "linear", {"cpu": GraphEntry("base.cpu.onnx", ())})},
        files={path.name: FileEntry(path.stat().st_size, hash_file(path)) for path in folder.iterdir()},
    )
    (folder / MANIFEST).write_bytes(manifest.dump())
    return folder


def parse_graph() -> onnx.ModelProto:
    model = parse_model(GRAPH)
    for value in (*model.graph.input, *model.graph.output):
        value.name = NAMES.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [NAMES.get(name, name) for name in node.input]
        node.output[:] = [NAMES.get(name, name) for name in node.output]
    return model


def reference(weights: dict[str, Floats], tokens: list[int]) -> Floats:
    """Logits (T, V), position by position, in float64."""
    x = weights["embedding"].astype(np.float64)[tokens]
    q, k, v = (x @ weights[name] for name in ("query", "key", "value"))
    rows = []
    for position in range(len(tokens)):
        mixed = []
        for head in range(HEADS):
            part = slice(head * SIZE, (head + 1) * SIZE)
            scores = np.exp(k[: position + 1, part] @ q[position, part] * 0.5)
            mixed.append(scores @ v[: position + 1, part] / scores.sum())
        rows.append(np.concatenate(mixed) @ weights["head"])
    return np.stack(rows).astype(np.float32)


def open_model(bundle: Path) -> Model:
    return Model.open(bundle / "base.cpu.onnx", ENTRY, threads=1)


def test_prefill_in_chunks(bundle: Path, weights: dict[str, Floats]) -> None:
    tokens = random_tokens(2 * PREFILL_CHUNK + 77)
    expected = reference(weights, tokens)
    with Runtime(bundle, threads=1) as runtime:
        assert np.abs(runtime.logits(tokens) - expected).max() <= TOLERANCE
    model = open_model(bundle)
    cache = model.new_cache()
    assert np.abs(model.read(cache, tokens)[0] - expected[-1]).max() <= TOLERANCE
    assert cache.tokens == tokens


def test_token_by_token_while_the_buffers_grow(bundle: Path, weights: dict[str, Floats]) -> None:
    tokens = random_tokens(540, seed=3)
    model = open_model(bundle)
    cache = model.new_cache()
    rows, capacities = [model.read(cache, tokens[:250])[0].copy()], {cache.capacity}
    for token in tokens[250:]:
        rows.append(model.read(cache, [token])[0].copy())
        capacities.add(cache.capacity)
    assert capacities == {256, 512, 1024}
    assert np.abs(np.stack(rows) - reference(weights, tokens)[249:]).max() <= TOLERANCE


@pytest.mark.parametrize("kept", [0, 1, 20, 59])
def test_rewound_cache_reads_like_a_fresh_one(bundle: Path, weights: dict[str, Floats], kept: int) -> None:
    model = open_model(bundle)
    cache = model.new_cache()
    first, second = random_tokens(60, seed=7), random_tokens(15, seed=8)
    model.read(cache, first[:50])
    model.read(cache, first[50:])
    cache.rewind(kept)
    expected = reference(weights, first[:kept] + second)
    assert np.abs(model.read(cache, second, keep=15) - expected[-15:]).max() <= TOLERANCE
    cache.rewind(kept + 5)
    assert np.abs(model.read(cache, second[5:], keep=10) - expected[-10:]).max() <= TOLERANCE


def test_growing_after_a_rewind_keeps_the_content(bundle: Path, weights: dict[str, Floats]) -> None:
    model = open_model(bundle)
    cache = model.new_cache()
    first, second = random_tokens(60, seed=7), random_tokens(5, seed=8)
    model.read(cache, first)
    cache.rewind(20)
    model.reserve(cache, 1000)
    assert cache.capacity == 1024
    assert np.abs(model.read(cache, second)[0] - reference(weights, first[:20] + second)[-1]).max() <= TOLERANCE


def test_two_caches_on_one_model_do_not_mix(bundle: Path, weights: dict[str, Floats]) -> None:
    model = open_model(bundle)
    texts = [random_tokens(30, seed=seed) for seed in (5, 6)]
    caches = [model.new_cache(), model.new_cache()]
    rows: list[list[Floats]] = [[], []]
    for position in range(30):
        for text, cache, row in zip(texts, caches, rows, strict=True):
            row.append(model.read(cache, [text[position]])[0].copy())
    for text, row in zip(texts, rows, strict=True):
        assert np.abs(np.stack(row) - reference(weights, text)).max() <= TOLERANCE


def test_second_prompt_reuses_the_first_ones_prefix(bundle: Path, weights: dict[str, Floats]) -> None:
    def greedy(prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            tokens.append(int(reference(weights, tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    first = random_tokens(40, seed=1)
    second = first[:25] + random_tokens(10, seed=2)
    with Runtime(bundle, threads=1) as runtime:
        assert list(runtime.generate(first, max_tokens=8).tokens) == greedy(first, 8)
        found = runtime.generate(second, max_tokens=8)
        assert found.reused_tokens == 25
        assert list(found.tokens) == greedy(second, 8)


def test_other_sizes_than_the_manifests_are_refused(bundle: Path) -> None:
    wrong = ModelEntry("hand-made", HEADS * SIZE, 1, SIZE, HEADS, VOCABULARY, CONTEXT, (1,), "growing")
    with pytest.raises(IntegrityError, match=r"past_key_values\.0\.key has sizes \[2, 4\], not \[4, 2\]"):
        Model.open(bundle / "base.cpu.onnx", wrong, threads=1)
