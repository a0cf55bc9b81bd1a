"""Stages compute what their graph computes, and variants share the stages whose weights are the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgelora.exporting.export import export
from edgelora_export.base.base import Base
from edgelora_export.graph import stages
from edgelora_export.plan.variants import Delta, Quantization, Variant
from edgelora_runtime import Bundle, IntegrityError, PackedCache, Runtime
from edgelora_runtime.session.model import Model
from tests.export.architectures.test_architectures import EACH, TOKENS, make
from tests.tiny import build_variants, random_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora_runtime.bundle.manifest import Manifest

    Floats = NDArray[np.float32]


@dataclass
class Noise(Delta):
    """A delta of one module."""

    module: str

    @property
    def modules(self) -> set[str]:
        return {self.module}

    def dense(self, module: str, weight: Floats) -> Floats:
        return np.random.default_rng(0).standard_normal(weight.shape, np.float32) * np.float32(0.1)


@pytest.fixture(scope="module")
def staged(tiny_recipe: Path, bundle4: Path) -> Iterator[Path]:
    """The bundle of the same recipe, cut into stages although it is small."""
    output = bundle4.with_name("staged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "LEAST_BYTES", 0)
        export(tiny_recipe.with_name("recipe4.toml"), output)
    yield output


def stage_files(manifest: Manifest, variant: str) -> list[str]:
    return [stage.file for stage in manifest.variants[variant].graphs["cpu"].stages]


def test_graphs_are_cut_where_they_share(staged: Path, bundle4: Path) -> None:
    manifest = Bundle.open(staged).manifest
    base, attention, plain, live = (stage_files(manifest, name) for name in ("base", "attention", "plain", "plain-live"))
    shared = [one == other for one, other in zip(base, attention, strict=True)]
    assert shared == [False, True, False, True, True], "attention, MLP, attention, MLP, head"
    assert plain == live == [], "they share the head alone"
    small = Bundle.open(bundle4).manifest
    assert not any(stage_files(small, name) for name in small.variants), "calling a stage costs more than it saves here"


def test_stages_compute_what_the_whole_graph_does(staged: Path, bundle4: Path) -> None:
    tokens = random_tokens(30, seed=4)
    with Runtime(staged, threads=1, kernels="onnxruntime") as parts, Runtime(bundle4, threads=1, kernels="onnxruntime") as whole:
        for variant in whole.variants:
            np.testing.assert_array_equal(parts.logits(tokens, variant=variant), whole.logits(tokens, variant=variant))
            np.testing.assert_array_equal(parts.embed(tokens, variant=variant), whole.embed(tokens, variant=variant))
            ours, theirs = (
                runtime.generate(tokens[:7], variant=variant, max_tokens=20, ignore_eos=True) for runtime in (parts, whole)
            )
            assert ours.tokens == theirs.tokens
        mix = {"plain": 0.4, "other": -0.7}
        np.testing.assert_array_equal(parts.logits(tokens, mix=mix), whole.logits(tokens, mix=mix))


@EACH
def test_every_architecture_can_be_cut(
    config_class: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each variant changes one product, so variants share all blocks but that product's."""
    monkeypatch.setattr(stages, "LEAST_BYTES", 0)
    make(tmp_path / "base", config_class, settings)
    deltas = ("self_attn.o_proj", "mlp.down_proj")
    variants = [Variant("base")]
    variants += [Variant(name, {}, delta=Noise(f"model.layers.1.{name}")) for name in deltas]
    manifest = build_variants(
        Base.open(tmp_path / "base"),
        variants,
        tmp_path / "bundle",
        quantization=Quantization(bits=32),
    )
    with Runtime(tmp_path / "bundle", threads=1, kernels="onnxruntime") as runtime:
        for variant in ("base", *deltas):
            assert len(stage_files(manifest, variant)) == 4, "before, attention, MLP, behind"
            model = Model.open(tmp_path / "bundle" / f"{variant}.cpu.onnx", manifest.model, threads=1)
            np.testing.assert_array_equal(runtime.logits(TOKENS, variant=variant), model.read(model.new_cache(), TOKENS, keep=40))
            again = model.new_cache()
            model.read(again, TOKENS[:9])
            generated = runtime.generate(TOKENS[:9], variant=variant, max_tokens=3, ignore_eos=True).tokens
            np.testing.assert_array_equal(model.read(again, generated[:1])[0].argmax(), generated[1])


def test_a_variant_opens_what_no_other_has_open(staged: Path) -> None:
    manifest = Bundle.open(staged).manifest
    own = {
        blob
        for stage in manifest.variants["attention"].graphs["cpu"].stages
        if stage.file not in stage_files(manifest, "base")
        for blob in stage.blobs
    }
    with Runtime(staged, threads=1, kernels="onnxruntime") as runtime:
        runtime.switch("base")
        before = runtime.memory.private
        receipt = runtime.switch("attention")
        assert receipt.cold
        assert receipt.bytes_mapped == sum(manifest.files[blob].size for blob in own)
        assert runtime.memory.private - before < 0.5 * before
    with Runtime(staged, threads=1, kernels="onnxruntime", memory_budget=1) as runtime:
        runtime.switch("base")
        assert runtime.switch("attention").bytes_mapped > receipt.bytes_mapped, "base left, and nobody held its stages"
    with Runtime(staged, threads=1, kernels="onnxruntime", whole_graphs=True) as runtime:
        runtime.switch("base")
        graph = manifest.variants["attention"].graphs["cpu"]
        assert runtime.switch("attention").bytes_mapped == sum(manifest.blob_bytes(graph).values())


def test_stages_of_a_variant_in_use_stay_open(staged: Path) -> None:
    with Runtime(staged, threads=1, kernels="onnxruntime", memory_budget=1) as runtime:
        stream = runtime.stream([3, 4, 5], variant="base", max_tokens=4, ignore_eos=True)
        next(iter(stream))
        whole = runtime.switch("plain").bytes_mapped
        assert runtime.switch("attention").bytes_mapped < whole, "the stream still has base's MLPs"
        assert len(list(stream)) > 0


def test_stages_are_kept_packed_one_by_one(staged: Path, tmp_path: Path) -> None:
    tokens = random_tokens(12)
    with (
        Runtime(staged, threads=1, kernels="onnxruntime", packed_cache=PackedCache(tmp_path)) as mapped,
        Runtime(staged, threads=1, kernels="onnxruntime") as plain,
    ):
        for variant in ("base", "attention", "base"):
            np.testing.assert_array_equal(mapped.logits(tokens, variant=variant), plain.logits(tokens, variant=variant))
        manifest = mapped.bundle.manifest
        files = {*stage_files(manifest, "base"), *stage_files(manifest, "attention")}
        assert len(list(tmp_path.iterdir())) == len(files)
        assert mapped.memory.private < plain.memory.private / 10


def lie(value: dict[str, Any], what: str) -> None:
    graphs = {name: value["variants"][name]["graphs"]["cpu"] for name in ("base", "attention", "plain")}
    parts = graphs["base"]["stages"]
    if what == "out of order":
        parts[1], parts[3] = parts[3], parts[1]
    elif what == "one left out":
        del parts[1]
        graphs["base"]["blobs"] = sorted({blob for part in parts for blob in part["blobs"]})
    elif what == "one twice":
        parts.append(parts[-1])
    elif what == "without the head":
        del parts[-1]
        graphs["base"]["blobs"] = sorted({blob for part in parts for blob in part["blobs"]})
    elif what == "other blobs":
        parts[0]["blobs"] = []
    else:
        parts[0]["file"] = "nothing.onnx"


@pytest.mark.parametrize("what", ["out of order", "one left out", "one twice", "without the head", "other blobs", "no such file"])
def test_stages_that_are_not_the_graph_are_refused(staged: Path, tmp_path: Path, what: str) -> None:
    copy = tmp_path / "bundle"
    copy.mkdir()
    for path in staged.iterdir():
        (copy / path.name).hardlink_to(path)
    value = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    lie(value, what)
    (copy / "bundle.json").unlink()
    (copy / "bundle.json").write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(IntegrityError), Runtime(copy, threads=1, kernels="onnxruntime") as runtime:
        runtime.logits([5, 6], variant="base")
