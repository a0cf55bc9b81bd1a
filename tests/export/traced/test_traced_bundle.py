"""From a traced graph to a bundle, without Optimum: a hand-written graph treats weights in every way that traced graphs do."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnx.parser import parse_model
from safetensors.numpy import save_file

from edgelora.exporting.train_router import train_router
from edgelora_export.base.base import Base
from edgelora_export.plan.variants import Delta, PackedRouter, Quantization, Variant
from edgelora_export.quantize.int4 import quantize_rtn
from edgelora_export.traced.bundle import TracedMatrices, TracedPlan, build_traced_bundle
from edgelora_export.traced.graph import prepare_traced, read_sizes
from edgelora_export.traced.optimum import TracedDecoder, digest
from edgelora_runtime import InputError, Runtime
from edgelora_runtime.session.model import Model
from tests.tiny import make_tokenizer, random_tokens
from tests.trained_changes import TrainedChange

if TYPE_CHECKING:
    from collections.abc import Mapping, Set
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora_runtime.bundle.manifest import Manifest

    Floats = NDArray[np.float32]

# A Gemm with a bias that passes through Identity, as GPT-2's; a Gemm with transB, as OPT's; a matrix stored transposed under a
# made-up name; positions; a head that transposes the embedding, or is scaled afterwards.
GRAPH = """
<ir_version: 10, opset_import: ["": 18]>
decoder (int64[batch, S] input_ids, int64[batch, T] attention_mask, int64[batch, S] position_ids,
         float[batch, 2, P, 16] past_key, float[batch, 2, P, 16] past_value)
     => (float[batch, S, 300] logits, float[batch, 2, T, 16] present_key, float[batch, 2, T, 16] present_value)
<int64[2] flat = {-1, 32}, int64[3] back = {1, -1, 32}, int64[4] split = {1, -1, 2, 16}, int64[1] axis = {2}>
{
    word = Gather (wte, input_ids)
    place = Gather (wpe, position_ids)
    x = Add (word, place)
    rows = Reshape (x, flat)
    bias_copy = Identity (bias)
    first = Gemm <alpha = 1.0, beta = 1.0> (rows, fc, bias_copy)
    active = Relu (first)
    second = Gemm <alpha = 1.0, beta = 1.0, transB = 1> (active, proj, bias)
    y = Reshape (second, back)
    k = MatMul (y, mangled)
    parts = Reshape (k, split)
    heads = Transpose <perm = [0, 2, 1, 3]> (parts)
    present_key = Concat <axis = 2> (past_key, heads)
    present_value = Concat <axis = 2> (past_value, heads)
    mean = ReduceMean <keepdims = 1> (present_key, axis)
    moved = Transpose <perm = [0, 2, 1, 3]> (mean)
    seen = Reshape (moved, back)
    mixed = Add (y, seen)
    headed = Transpose <perm = [1, 0]> (wte)
    HEAD
}
"""
HEADS = {
    "logits = MatMul (mixed, headed)": 1.0,
    "raw = MatMul (mixed, headed)\n two = Constant <value = float {2.0}> ()\n logits = Mul (raw, two)": 2.0,
}


@dataclass
class Traced:
    """The hand-written decoder: its weights in the checkpoint's layout, its graph, and its base folder."""

    weights: dict[str, Floats]
    proto: onnx.ModelProto
    base: Base
    decoder: TracedDecoder


def make_traced(folder: Path, head: str, *, equal: bool = False) -> Traced:
    random = np.random.default_rng(0)
    shapes = {"wte": (300, 32), "wpe": (256, 32), "fc": (32, 32), "proj": (32, 32), "mangled": (32, 32), "bias": (32,)}
    weights = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    if equal:
        weights["proj"] = np.ascontiguousarray(weights["fc"].T)
    proto = parse_model(GRAPH.replace("HEAD", head))
    names = {
        f"{stem}_{kind}": f"{full}.0.{kind}"
        for stem, full in (("past", "past_key_values"), ("present", "present"))
        for kind in ("key", "value")
    }
    for value in (*proto.graph.input, *proto.graph.output):
        value.name = names.get(value.name, value.name)
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    proto.graph.initializer.extend(numpy_helper.from_array(weight, name) for name, weight in weights.items())
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "hand-made", "eos_token_id": 1}), encoding="utf-8")
    make_tokenizer().save_pretrained(folder)
    model = prepare_traced(ir.serde.deserialize_model(proto))
    # Weights of products are (N, K); the graph stores fc and mangled as (K, N).
    owners = {"wte": ["wte", "head"], "fc": ["mlp.fc"], "proj": ["mlp.proj"], "mangled": ["attention.key"], "wpe": ["wpe"]}
    modules: dict[str, list[str]] = {}
    for name, held in owners.items():
        modules.setdefault(digest(weights[name].T if name in ("fc", "mangled") else weights[name]), []).extend(held)
    decoder = TracedDecoder(
        model,
        modules,
        frozenset({"head", "mlp.fc", "mlp.proj", "attention.key"}),
        digest(weights["wte"]),
        "hand-made",
        32,
        read_sizes(model.graph, "hand-made"),
        256,
    )
    return Traced(weights, proto, Base.open(folder), decoder)


@dataclass
class Change(Delta):
    """A delta given as matrices (N, K)."""

    deltas: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def modules(self) -> Set[str]:
        return self.deltas.keys()

    def dense(self, module: str, weight: Floats) -> Floats:
        return self.deltas[module]


def build(
    traced: Traced, output: Path, variants: list[Variant], router: PackedRouter | None = None, **quantization: Any
) -> Manifest:
    matrices = TracedMatrices(traced.decoder)
    grid = Quantization(**{"bits": 32, **quantization})
    plan = TracedPlan(traced.base, tuple(variants), grid, router=router)
    return build_traced_bundle(plan, traced.decoder, matrices, output)


def expected_logits(
    traced: Traced, tokens: list[int], weights: Mapping[str, Floats] | None = None, *, chunk: int | None = None
) -> Floats:
    """Logits (T, V) of the hand-written graph, `chunk` tokens at a time. weights: replace the graph's own, by name."""
    proto = onnx.ModelProto()
    proto.CopyFrom(traced.proto)
    for tensor in proto.graph.initializer:
        if weights is not None and tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weights[tensor.name]), tensor.name))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    key = value = np.zeros((1, 2, 0, 16), np.float32)
    rows = []
    for start in range(0, len(tokens), chunk or len(tokens)):
        stop = min(start + (chunk or len(tokens)), len(tokens))
        feeds = {
            "input_ids": np.array([tokens[start:stop]]),
            "attention_mask": np.ones((1, stop), np.int64),
            "position_ids": np.arange(start, stop)[None],
            "past_key_values.0.key": key,
            "past_key_values.0.value": value,
        }
        logits, key, value = session.run(["logits", "present.0.key", "present.0.value"], feeds)
        rows.append(logits[0])
    return np.concatenate(rows)


def run_bundle(bundle: Path, tokens: list[int], variant: str = "base") -> Floats:
    with Runtime(bundle, threads=1) as runtime:
        return runtime.logits(tokens, variant=variant)


@pytest.mark.parametrize("head", HEADS)
def test_float32_bundle_computes_what_the_graph_computed(head: str, tmp_path: Path) -> None:
    traced = make_traced(tmp_path / "base", head)
    manifest = build(traced, tmp_path / "bundle", [Variant("base")])
    tokens = random_tokens(20)
    assert np.abs(run_bundle(tmp_path / "bundle", tokens) - expected_logits(traced, tokens)).max() < 1e-4
    assert manifest.model.cache == "growing"
    assert (manifest.model.layers, manifest.model.kv_heads, manifest.model.head_size) == (1, 2, 16)


@pytest.mark.parametrize("head", HEADS)
def test_last_positions_alone_get_logits(head: str, tmp_path: Path) -> None:
    traced = make_traced(tmp_path / "base", head)
    build(traced, tmp_path / "bundle", [Variant("base")])
    tokens = random_tokens(20)
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        found = runtime.generate(tokens, max_tokens=1, variant="base").tokens
    assert list(found) == [int(expected_logits(traced, tokens)[-1].argmax())]


@pytest.mark.parametrize("chunk", [1, 7])
def test_positions_continue_after_the_cache(chunk: int, tmp_path: Path) -> None:
    traced = make_traced(tmp_path / "base", next(iter(HEADS)))
    manifest = build(traced, tmp_path / "bundle", [Variant("base")])
    tokens = random_tokens(20)
    model = Model.open(tmp_path / "bundle" / "base.cpu.onnx", manifest.model, threads=1)
    cache = model.new_cache()
    parts = [tokens[start : start + chunk] for start in range(0, 20, chunk)]
    found = np.concatenate([model.read(cache, part, keep=len(part)).copy() for part in parts])
    assert np.abs(found - expected_logits(traced, tokens, chunk=chunk)).max() < 1e-4


@pytest.mark.parametrize("grid", [{"bits": 4}, {"bits": 4, "block_size": 64, "symmetric": False}, {"bits": 8}], ids=str)
def test_quantized_bundle_computes_with_the_dequantized_weights(grid: dict[str, Any], tmp_path: Path) -> None:
    traced = make_traced(tmp_path / "base", next(iter(HEADS)))
    build(traced, tmp_path / "bundle", [Variant("base")], method="rtn", **grid)
    rounded = {name: quantize_rtn(traced.weights[name], **grid).dequantize() for name in ("wte", "proj")}
    rounded |= {name: quantize_rtn(traced.weights[name].T.copy(), **grid).dequantize().T for name in ("fc", "mangled")}
    tokens = random_tokens(20)
    expected = expected_logits(traced, tokens, rounded)
    found = run_bundle(tmp_path / "bundle", tokens)
    assert np.abs(found - expected).max() < 0.05 * expected.std()  # the rounding of activations to int8 remains
    assert np.abs(found - expected_logits(traced, tokens)).max() > np.abs(found - expected).max()


def test_variants_add_their_deltas_and_share_the_rest(tmp_path: Path) -> None:
    traced = make_traced(tmp_path / "base", next(iter(HEADS)))
    random = np.random.default_rng(1)
    deltas = {name: random.normal(0, 0.1, (32, 32)).astype(np.float32) for name in ("mlp.fc", "attention.key")}
    manifest = build(traced, tmp_path / "bundle", [Variant("base"), Variant("other", delta=Change(deltas))])
    tokens = random_tokens(20)
    changed = {"fc": traced.weights["fc"] + deltas["mlp.fc"].T, "mangled": traced.weights["mangled"] + deltas["attention.key"].T}
    found = run_bundle(tmp_path / "bundle", tokens, "other")
    assert np.abs(found - expected_logits(traced, tokens, changed)).max() < 1e-4
    assert np.abs(run_bundle(tmp_path / "bundle", tokens) - expected_logits(traced, tokens)).max() < 1e-4
    base, other = (set(manifest.variants[name].graphs["cpu"].blobs) for name in ("base", "other"))
    assert len(base - other) == len(other - base) == 2
    assert len(base & other) == 3  # the embedding, which is also the head; proj; the positions
    held = sum(entry.size for name, entry in manifest.files.items() if name.endswith(".bin"))
    assert held == sum(weight.nbytes for name, weight in traced.weights.items() if name != "bias") + 2 * 32 * 32 * 4


def test_a_router_goes_along(tmp_path: Path) -> None:
    traced = make_traced(tmp_path / "base", "logits = MatMul (mixed, headed)")
    packed = train_router({"v": [f"the cat number {n}" for n in range(40)]}, fallback="base")
    assert build(traced, tmp_path / "bundle", [Variant("base"), Variant("v")], packed).router == packed.entry
    with Runtime(tmp_path / "bundle", threads=1) as runtime:
        assert runtime.generate("the cat number 77", variant="auto", max_tokens=1).variant == "v"


def test_modules_without_weights_of_their_own_are_refused(tmp_path: Path) -> None:
    """The head is tied, and a traced graph holds two layers with equal weights as one tensor."""
    traced = make_traced(tmp_path / "base", next(iter(HEADS)), equal=True)
    assert set(TracedMatrices(traced.decoder).shapes) == {"attention.key"}
    modules = ("head", "mlp.fc", "mlp.proj", "nothing")
    change = Change({name: np.zeros((32, 32), np.float32) for name in modules})
    with pytest.raises(InputError, match=r"variant v changes head, mlp\.fc, mlp\.proj, nothing, which are no linear layers"):
        build(traced, tmp_path / "bundle", [Variant("v", delta=change)])
    assert not (tmp_path / "bundle").exists()
    build(traced, tmp_path / "bundle", [Variant("base")])
    tokens = random_tokens(20)
    assert np.abs(run_bundle(tmp_path / "bundle", tokens) - expected_logits(traced, tokens)).max() < 1e-4


def test_live_variants_are_refused(tmp_path: Path) -> None:
    traced = make_traced(tmp_path / "base", next(iter(HEADS)))
    with pytest.raises(InputError, match=r"variants now are live: .* use kind = 'merged'"):
        build(traced, tmp_path / "bundle", [Variant("base"), Variant("now", {"a": 1.0}, live={"a": 1.0})])


@pytest.mark.parametrize("name", ["past_key_values.0.key_value", "conv_state"])
def test_graphs_that_the_runtime_cannot_feed_are_refused(name: str, tmp_path: Path) -> None:
    traced = make_traced(tmp_path / "base", next(iter(HEADS)))
    model = traced.decoder.graph.clone()
    next(value for value in model.graph.inputs if value.name == "past_key_values.0.key").name = name
    with pytest.raises(InputError, match="has other inputs than the runtime feeds"):
        read_sizes(model.graph, "hand-made")


def test_caches_of_different_shapes_are_refused(tmp_path: Path) -> None:
    traced = make_traced(tmp_path / "base", next(iter(HEADS)))
    model = traced.decoder.graph.clone()
    next(value for value in model.graph.inputs if value.name == "past_key_values.0.key").shape = ir.Shape((1, 2, "P", 8))
    with pytest.raises(InputError, match="caches of different shapes"):
        read_sizes(model.graph, "hand-made")


def test_an_embedding_that_the_graph_does_not_look_up_plainly_stays_in_float32(tmp_path: Path) -> None:
    traced = make_traced(tmp_path / "base", next(iter(HEADS)))
    decoder = replace(traced.decoder, embedding="unknown")
    assert TracedMatrices(decoder).embedding is None
    build(replace(traced, decoder=decoder), tmp_path / "bundle", [Variant("base")])
    tokens = random_tokens(20)
    assert np.abs(run_bundle(tmp_path / "bundle", tokens) - expected_logits(traced, tokens)).max() < 1e-4


@pytest.mark.parametrize(
    ("change", "mention"),
    [
        (TrainedChange({}, {"mlp.fc": np.ones(32, np.float32)}), "variant v changes biases, but"),
        (TrainedChange({}, rows=40), "variant v changes the size of the vocabulary, but"),
    ],
    ids=["biases", "vocabulary"],
)
def test_biases_and_vocabularies_are_refused(change: TrainedChange, mention: str, tmp_path: Path) -> None:
    traced = make_traced(tmp_path / "base", next(iter(HEADS)))
    with pytest.raises(InputError, match=f"{mention} .* is exported through Optimum"):
        build(traced, tmp_path / "bundle", [Variant("base"), Variant("v", {"a": 1.0}, delta=change)])
    assert not (tmp_path / "bundle").exists()
