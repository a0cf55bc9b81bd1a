"""Which variants keep the codes of merge-aware training, and what a recipe that forbids it is told."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgelora.adapters.folder import Adapter, Provenance, write_provenance
from edgelora.composing.compose import compose
from edgelora.exporting.export import export
from edgelora.exporting.kept_codes import find_kept
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora.mix.mix import Mix
from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.bundle.gate import Gate
from edgelora_export.plan.variants import Quantization
from edgelora_export.quantize.int4 import quantize_rtn
from edgelora_runtime.errors import InputError
from tests.tiny import make_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_runtime.bundle.manifest import Manifest


@pytest.fixture
def aware(tiny_base: Path, tmp_path: Path) -> Path:
    """A random adapter whose edgelora.json says that it is merge-aware."""
    make_adapter(tiny_base, tmp_path / "aware")
    sha256 = Base.open(tiny_base).sha256
    provenance = Provenance("tiny", sha256, "int4", "", 0, "default", 0, 4, 8.0, 1, 1e-3, merge_aware=True)
    write_provenance(tmp_path / "aware", provenance)
    return tmp_path / "aware"


def build(base: Path, adapter: Path, output: Path, variant: VariantRecipe, notes: list[str], **settings: Any) -> Manifest:
    variants = {"base": VariantRecipe({}), "v": variant}
    recipe = Recipe(str(base), {"a": adapter}, variants, Quantization(**settings), gate=Gate(policy="off"))
    return export(recipe, output, on_note=notes.append)


@pytest.mark.parametrize(
    ("weights", "method", "kept"),
    [
        ({"a": 1.0}, "linear", True),
        ({"a": 0.5}, "linear", False),
        ({"a": 1.0}, "ties", False),
        ({"a": {"*": 1.0}}, "linear", True),
    ],
)
def test_only_the_adapter_alone_and_whole_is_kept(
    tiny_base: Path, aware: Path, weights: dict[str, Any], method: str, kept: bool
) -> None:
    decoder = read_decoder(Base.open(tiny_base).config)
    mix = Mix({"a": Adapter.open(aware, "a")}, weights, method)
    assert (find_kept(mix, decoder) is not None) == kept


def test_composed_adapter_is_not_merge_aware(aware: Path, tmp_path: Path) -> None:
    compose({"a": (aware, 1.0)}, tmp_path / "composed")
    provenance = Adapter.open(tmp_path / "composed").provenance
    assert provenance is not None
    assert not provenance.merge_aware


def test_reference_is_the_rounded_sum(tiny_base: Path, aware: Path) -> None:
    base, module = Base.open(tiny_base), "model.layers.1.mlp.up_proj"
    mix = Mix({"a": Adapter.open(aware, "a")}, {"a": 1.0})
    kept = find_kept(mix, read_decoder(base.config))
    assert kept is not None
    weight, head = base.tensor(f"{module}.weight"), base.tensor("lm_head.weight")
    rounded = quantize_rtn(weight + mix.dense(module, weight)).dequantize()
    np.testing.assert_allclose(weight + kept.dense(module, weight), rounded, atol=1e-7)
    np.testing.assert_allclose(head + kept.dense("lm_head", head), quantize_rtn(head).dequantize(), atol=1e-7)


def test_another_grid_is_noted(tiny_base: Path, aware: Path, tmp_path: Path) -> None:
    for settings, noted in (
        ({}, ""),
        ({"block_size": 64}, "quantized anew"),
        ({"symmetric": False}, "quantized anew"),
        ({"bits": 8}, "quantized anew"),
        ({"int8": ("*.mlp.down",)}, "get 8 bits"),
        ({"bits": 32}, ""),
    ):
        notes: list[str] = []
        name = f"bundle-{len(list(tmp_path.iterdir()))}"
        build(tiny_base, aware, tmp_path / name, VariantRecipe({"a": 1.0}), notes, method="rtn", **settings)
        about = [note for note in notes if "merge-aware" in note]
        assert (len(about), noted in "".join(about)) == (bool(noted), True), settings


def test_trained_base_is_refused(tiny_base: Path, aware: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave merge_base out"):
        build(tiny_base, aware, tmp_path / "bundle", VariantRecipe({"a": 1.0}, merge_base="trained"), [])


def test_rounding_bundle_stores_one_head_for_all(tiny_base: Path, aware: Path, tmp_path: Path) -> None:
    """With method rtn nothing differs from other variants, so nothing is stored twice."""
    kept = build(tiny_base, aware, tmp_path / "kept", VariantRecipe({"a": 1.0}), [], method="rtn")
    provenance = Adapter.open(aware).provenance
    assert provenance is not None
    write_provenance(aware, replace(provenance, merge_aware=False))
    plain = build(tiny_base, aware, tmp_path / "plain", VariantRecipe({"a": 1.0}, merge_base="float"), [], method="rtn")
    assert kept.variants["v"].own_vocab == ()
    assert {name for name in kept.files if name.endswith(".bin")} == {name for name in plain.files if name.endswith(".bin")}
