"""inspect and the report show the manifest's figures."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from edgelora.adapters.folder import Provenance, write_provenance
from edgelora.cli.inspect import show_bundle
from edgelora.data.calibration import hash_data
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora.report.fidelity_pages import write_fidelity
from edgelora_export.base.base import Base
from edgelora_export.bundle.gate import Gate
from edgelora_export.plan.variants import Quantization
from edgelora_runtime import Bundle
from tests.tiny import make_adapter

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def judged(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A judged bundle with a variant on a chosen merge base, one on a given merge base, and a live one."""
    root = tmp_path_factory.mktemp("judged")
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"the cat {n}", "completion": f" sat {n}"}) + "\n" for n in range(10)))
    make_adapter(tiny_base, root / "a")
    base_sha256 = Base.open(tiny_base).sha256
    write_provenance(
        root / "a",
        Provenance("b", base_sha256, "nf4", hash_data(data), 10, "default", 0, 4, 8.0, 1, 1e-3, data_file="../rows.jsonl"),
    )
    variants = {
        "base": VariantRecipe({}),
        "chosen": VariantRecipe({"a": 1.0}),
        "held": VariantRecipe({"a": 0.5}, merge_base="trained"),
        "alive": VariantRecipe({"a": 1.0}, "live"),
    }
    quantization = Quantization(method="rtn", int8=("*.mlp.down",))
    export(Recipe(str(tiny_base), {"a": root / "a"}, variants, quantization, gate=Gate(retention=-1e6)), root / "bundle")
    return Bundle.open(root / "bundle")


def test_the_json_holds_every_figure(judged: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    show_bundle(judged, as_json=True)
    shown = {variant["name"]: variant for variant in json.loads(capsys.readouterr().out)["variants"]}
    for name, entry in judged.manifest.variants.items():
        assert entry.fidelity is not None
        assert shown[name]["fidelity"] == asdict(entry.fidelity)
        assert (shown[name]["merge_base"], shown[name]["merge_losses"]) == (entry.merge_base, entry.merge_losses)
        assert shown[name]["int8"] == list(entry.int8)
    assert set(shown["chosen"]["merge_losses"]) == {"float", "trained"}


def test_the_tables_hold_every_figure(judged: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    show_bundle(judged, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]
    sizes, figures = ({row[0]: row[1:] for row in cells if len(row) == width} for width in (7, 11))
    entries = judged.manifest.variants
    losses = entries["chosen"].merge_losses
    into = {"float": "float", "trained": "trained, nf4"}[entries["chosen"].merge_base]
    assert sizes["chosen"][3] == f"{into} (loss: float {losses['float']:.4g}, trained {losses['trained']:.4g})"
    assert [sizes[name][3] for name in ("base *", "held", "alive")] == ["–", "trained, nf4", "–"]
    for name, entry in entries.items():
        found = entry.fidelity
        assert found is not None
        kept = "–" if found.retention is None else f"{found.retention:.4f}"
        own = "–" if found.trained_kl is None else f"{found.trained_kl:.2g}"
        likeness = [f"{found.kl_mean:.2g}", f"{found.kl_p99:.2g}", own, f"{found.top1:.3f}"]
        answers = f"{found.answers_kept} of {found.answers}" if found.answers else "–"
        perplexities = [f"{found.perplexity:.3f}", f"{found.teacher_perplexity:.3f}"]
        assert figures[name] == [found.outcome, kept, *likeness, answers, *perplexities, "2"]
    assert figures["base"][4] == "–" and figures["held"][4] != "–"


def test_the_report_names_the_merge_base_and_its_losses(judged: Bundle, tmp_path: Path) -> None:
    index, *paths = write_fidelity(judged, tmp_path / "report")
    pages = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    assert pages.keys() == judged.manifest.variants.keys()
    assert all(f'href="{path.name}"' in index.read_text(encoding="utf-8") for path in paths)
    chosen = judged.manifest.variants["chosen"]
    assert chosen.fidelity is not None and chosen.fidelity.trained_kl is not None
    for mention in (
        "<td>the trained base, held as nf4</td>" if chosen.merge_base == "trained" else "<td>the float base</td>",
        f"<td>{chosen.fidelity.kernels}</td>",
        f"float {chosen.merge_losses['float']:.4f}",
        f"trained {chosen.merge_losses['trained']:.4f}",
        f"{chosen.fidelity.trained_kl:.4g}",
        f"{chosen.fidelity.teacher_perplexity:.3f}",
    ):
        assert mention in pages["chosen"]
    assert "Merged into" not in pages["alive"]
