"""Draft tables count how completions continue, go into bundles with their adapters, and serve variants and mixes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from edgelora.adapters.folder import Provenance, write_provenance
from edgelora.data.calibration import hash_data
from edgelora.exporting.draft_tables import MIN_COUNT, count_continuations
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe, parse_recipe
from edgelora_export.base.base import Base
from edgelora_export.plan.calibration import Sample
from edgelora_export.plan.variants import Quantization
from edgelora_runtime import Bundle, IntegrityError, Runtime
from edgelora_runtime.bundle.draft_table import DRAFT_TABLE, MAX_ENTRIES, DraftTable
from edgelora_runtime.bundle.manifest import MANIFEST
from tests.tiny import make_adapter

if TYPE_CHECKING:
    from pathlib import Path

END = 1


def test_what_follows_most_often_is_in_the_table() -> None:
    table = count_continuations([Sample((7, 8, 9), 1), Sample((7, 8, 9), 1), Sample((7, 8, 5), 1)], END)
    assert table.find([8]) == (9, 2 / 3)
    assert table.find([7]) == (8, 1.0)


def test_what_occurs_once_is_not() -> None:
    assert MIN_COUNT == 2
    assert len(count_continuations([Sample((7, 8, 9), 1)], END)) == 0


def test_prompts_are_contexts_but_are_not_guessed() -> None:
    """In rows, completions are followed by the end token."""
    table = count_continuations([Sample((3, 4, 5, 6), 3)] * 2, END)
    assert table.find([4]) is None
    assert table.find([4, 5]) == (6, 1.0)
    assert table.find([6]) == (END, 1.0)


def test_longer_contexts_stay_where_they_change_a_guess() -> None:
    samples = [Sample((2, 8, 9), 1)] * 9 + [Sample((3, 8, 5), 1)] * 6
    table = count_continuations(samples, END)
    assert table.find([8]) == (9, 0.6)
    assert table.find([3, 8]) == (5, 1.0)
    assert table.find([2, 8]) == (9, 1.0)
    assert len(count_continuations([Sample((2, 8, 9), 1), Sample((3, 8, 9), 1)] * 2, END)) == 3, "(2), (3) and (8) say it all"


def test_a_table_is_bounded() -> None:
    samples = [Sample((n, n + 1), 1) for n in range(MAX_ENTRIES + 5) for _ in range(2)] + [Sample((5, 6), 1)]
    table = count_continuations(samples, END)
    assert len(table) == MAX_ENTRIES
    assert table.find([5]) == (6, 1.0)


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters with training data, and one without."""
    root = tmp_path_factory.mktemp("drafts")
    for name in ("cats", "days", "lost"):
        rows = [json.dumps({"prompt": f"{name} {n}:", "completion": f" {name} and more {name}"}) for n in range(20)]
        (root / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
        make_adapter(tiny_base, root / name)
        where = "" if name == "lost" else f"../{name}.jsonl"
        digest = hash_data(root / f"{name}.jsonl")
        write_provenance(
            root / name,
            Provenance("b", Base.find(str(tiny_base)).sha256, "none", digest, 20, "default", 0, 4, 8.0, 1, 1e-3, where),
        )
    return {name: root / name for name in ("cats", "days", "lost")}


def make_bundle(base: Path, adapters: dict[str, Path], output: Path, *, draft_tables: bool = True) -> Bundle:
    variants = {
        "base": VariantRecipe({}),
        "cats": VariantRecipe({"cats": 1.0}),
        "less": VariantRecipe({"days": -0.5}),
        "both": VariantRecipe({"cats": 0.5, "days": 0.5}, kind="live"),
    }
    export(Recipe(str(base), adapters, variants, Quantization(32), draft_tables=draft_tables), output, gate="off")
    return Bundle.open(output)


@pytest.fixture(scope="module")
def bundle(tiny_base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tiny_base, adapters, tmp_path_factory.mktemp("drafts") / "bundle")


def test_a_bundle_holds_a_table_for_each_adapter_with_data(bundle: Bundle) -> None:
    files = {name: entry.draft_table for name, entry in bundle.manifest.adapters.items()}
    assert files["lost"] is None
    for name in ("cats", "days"):
        file = files[name]
        assert file is not None
        assert file == bundle.manifest.files[file].sha256 + DRAFT_TABLE
        assert len(DraftTable.read(bundle.read(file), file, bundle.manifest.model.vocab_size)) > 5
    assert bundle.verify() == []


def test_there_are_tables_only_where_a_recipe_asks_for_them(tiny_base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    recipe = {"base": "b", "variants": {"base": {"mix": {}}}}
    assert parse_recipe(recipe, tmp_path).draft_tables is False
    assert parse_recipe({**recipe, "draft_tables": True}, tmp_path).draft_tables is True
    bundle = make_bundle(tiny_base, adapters, tmp_path / "bundle", draft_tables=False)
    assert not any(entry.draft_table for entry in bundle.manifest.adapters.values())
    assert not list(bundle.folder.glob(f"*{DRAFT_TABLE}"))


def test_a_mix_draws_on_the_tables_of_what_it_adds(bundle: Bundle) -> None:
    with Runtime(bundle, threads=1) as runtime:
        speculation = runtime._speculation
        found = {name: speculation._find_adapters(runtime._choose(name, None)) for name in runtime.variants}
        assert found == {"base": [], "cats": ["cats"], "less": [], "both": ["cats", "days"]}
        assert speculation._find_adapters(runtime._choose(None, {"days": 1.0, "cats": -1.0})) == ["days"]
        expected = runtime.generate("cats 3:", variant="both", max_tokens=20, speculation="off")
        assert runtime.generate("cats 3:", variant="both", max_tokens=20, speculation="on").tokens == expected.tokens
        assert len(speculation._tables._tables) == 2


def test_a_manifest_that_names_an_absent_table_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(bundle.folder, tmp_path / "bundle")
    manifest = json.loads((copy / MANIFEST).read_bytes())
    manifest["adapters"]["cats"]["draft_table"] = "gone.drafts.safetensors"
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"adapter cats uses gone\.drafts\.safetensors, which files lacks"):
        Bundle.open(copy)
