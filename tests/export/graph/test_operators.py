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
from edgelora_runtime.bundle.graphs.operators import BODY, NATIVE, TRACED
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
# Architectures whose graphs have, among them, every operator of all: position scales and norms of heads, caps, plain ones.
QUICK = {"ministral3, padded heads, windows": GRIDS[:1], "gemma2": GRIDS[:1], "qwen3": GRIDS[2:]}
VARIANTS = {"base": VariantRecipe({}), "merged": VariantRecipe({"a": 1.0}), "a-live": VariantRecipe({"a": 1.0}, "live")}


def export_kinds(name: str, grids: tuple[Quantization, ...], folder: Path) -> list[Path]:
    """Exports a base as a bundle for each grid, with merged and live variants, for both targets where it is quantized."""
    make(folder / "base", *SHAPES[name])
    make_adapter(folder / "base", folder / "adapter", target_modules="all-linear")
    bundles = []
    for grid in grids:
        targets = ("cpu",) if grid.bits == 32 else ("cpu", "gpu")
        bundles.append(folder / f"bundle{grid.bits}")
        export(Recipe(str(folder / "base"), {"a": folder / "adapter"}, VARIANTS, grid, targets=targets), bundles[-1], gate="off")
    return bundles


def list_operators(bundle: Path) -> tuple[Operators, Operators]:
    """The operators of a bundle's graphs, and those of their functions' bodies, as the onnx package reads them."""
    models = [onnx.load(path, load_external_data=False) for path in bundle.glob("*.onnx")]
    bodies = {(node.domain, node.op_type) for model in models for function in model.functions for node in function.node}
    return {(node.domain, node.op_type) for model in models for node in model.graph.node}, bodies


def check_kinds(names: Mapping[str, tuple[Quantization, ...]], folder: Path) -> None:
    used: Operators = set()
    bodies: Operators = set()
    for at, (name, grids) in enumerate(names.items()):
        for bundle in export_kinds(name, grids, folder / str(at)):
            Bundle.open(bundle)
            outer, inner = list_operators(bundle)
            used, bodies = used | outer, bodies | inner
    assert bodies == BODY
    assert used | bodies == NATIVE


def test_graphs_of_a_few_architectures_use_exactly_the_operators_of_the_list(tmp_path: Path) -> None:
    check_kinds(QUICK, tmp_path)


@pytest.mark.slow
def test_all_architectures_use_exactly_the_operators_of_the_list(tmp_path: Path) -> None:
    check_kinds(dict.fromkeys(SHAPES, GRIDS), tmp_path)


@pytest.mark.slow
def test_stages_open_as_their_graphs_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "LEAST_BYTES", 1)
    (bundle,) = export_kinds("llama", GRIDS[:1], tmp_path)
    opened = Bundle.open(bundle)
    assert any(graph.stages for entry in opened.manifest.variants.values() for graph in entry.graphs.values())


def test_no_operator_runs_a_graph_draws_numbers_or_makes_a_sequence() -> None:
    banned = {"If", "Loop", "Scan", "SequenceMap", "RandomNormal", "RandomUniform", "Multinomial", "Bernoulli", "StringConcat"}
    assert not banned & {name for _, name in TRACED}
    for domain, name in TRACED - NATIVE:
        kinds = {str(attribute.type) for attribute in onnx.defs.get_schema(name, domain=domain).attributes.values()}
        assert not kinds & {"AttrType.GRAPH", "AttrType.GRAPHS"}, name
