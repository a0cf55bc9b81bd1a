"""The operators that the runtime lets a bundle's graphs use are those that export writes, no fewer and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import pytest

from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora_export.graph import stages
from edgelora_export.plan.variants import Quantization
from edgelora_runtime import Bundle
from edgelora_runtime.bundle.graphs.operators import JOINED_BODY, LIVE_BODY, LIVE_PRODUCTS, NATIVE, TRACED
from tests.export.architectures.test_architectures import SHAPES, make
from tests.tiny import make_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    Operators = set[tuple[str, str]]

GRIDS = (
    Quantization(bits=4, block_size=16, method="rtn"),
    Quantization(bits=8, block_size=32, symmetric=False, method="rtn"),
    Quantization(bits=32),
)
# Architectures whose graphs have, among them, every operator of all: position scales and norms of heads, caps, plain ones, and
# products of one part behind a norm.
QUICK = {"ministral3, padded heads, windows": GRIDS[:1], "gemma2": GRIDS[:1], "qwen3": GRIDS[2:], "phi3": GRIDS[:1]}
VARIANTS = {"base": VariantRecipe({}), "merged": VariantRecipe({"a": 1.0}), "a-live": VariantRecipe({"a": 1.0}, "live")}


def export_kinds(name: str, grids: tuple[Quantization, ...], folder: Path, modules: str | list[str] = "all-linear") -> list[Path]:
    """Exports a base as a bundle for each grid, with merged and live variants, for both targets where it is quantized.

    modules: of the adapter.
    """
    make(folder / "base", *SHAPES[name])
    make_adapter(folder / "base", folder / "adapter", target_modules=modules)
    bundles = []
    for grid in grids:
        targets = ("cpu",) if grid.bits == 32 else ("cpu", "gpu")
        bundles.append(folder / f"bundle{grid.bits}")
        export(Recipe(str(folder / "base"), {"a": folder / "adapter"}, VARIANTS, grid, targets=targets), bundles[-1], gate="off")
    return bundles


def list_operators(bundle: Path) -> tuple[Operators, Operators, Operators]:
    """The operators of a bundle's graphs, of its live products' bodies and of joined ones', as the onnx package reads them."""
    models = [onnx.load(path, load_external_data=False) for path in bundle.glob("*.onnx")]
    functions = [function for model in models for function in model.functions]
    live = {(node.domain, node.op_type) for each in functions if each.name in LIVE_PRODUCTS for node in each.node}
    joined = {(node.domain, node.op_type) for each in functions if each.name not in LIVE_PRODUCTS for node in each.node}
    return {(node.domain, node.op_type) for model in models for node in model.graph.node}, live, joined


def check_kinds(names: Mapping[str, tuple[Quantization, ...]], folder: Path) -> None:
    found: tuple[Operators, ...] = (set(), set(), set())
    for at, (name, grids) in enumerate(names.items()):
        for bundle in export_kinds(name, grids, folder / str(at)):
            Bundle.open(bundle)
            for all_found, new in zip(found, list_operators(bundle), strict=True):
                all_found.update(new)
    used, live, joined = found
    assert live == LIVE_BODY
    assert joined == JOINED_BODY
    assert used | live | joined == NATIVE


def test_graphs_of_a_few_architectures_use_exactly_the_operators_of_the_list(tmp_path: Path) -> None:
    check_kinds(QUICK, tmp_path)


@pytest.mark.slow
def test_all_architectures_use_exactly_the_operators_of_the_list(tmp_path: Path) -> None:
    check_kinds(dict.fromkeys(SHAPES, GRIDS), tmp_path)


@pytest.mark.slow
def test_stages_open_as_their_graphs_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "LEAST_BYTES", 1)
    (bundle,) = export_kinds("llama", GRIDS[:1], tmp_path, ["q_proj"])
    opened = Bundle.open(bundle)
    assert any(graph.stages for entry in opened.manifest.variants.values() for graph in entry.graphs.values())


def test_no_operator_runs_a_graph_draws_numbers_or_makes_a_sequence() -> None:
    banned = {"If", "Loop", "Scan", "SequenceMap", "RandomNormal", "RandomUniform", "Multinomial", "Bernoulli", "StringConcat"}
    assert not banned & {name for _, name in TRACED}
    for domain, name in TRACED - NATIVE:
        kinds = {str(attribute.type) for attribute in onnx.defs.get_schema(name, domain=domain).attributes.values()}
        assert not kinds & {"AttrType.GRAPH", "AttrType.GRAPHS"}, name
