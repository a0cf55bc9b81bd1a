"""Calibration sets: interleaved rows of the files, disjoint, repeatable, and only from unchanged data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edgelora.adapters.folder import Adapter, Provenance, write_provenance
from edgelora.data import calibration as calibration_data
from edgelora.data.calibration import GENERAL_TEXT, find_training_data, gather_calibration, hash_data
from edgelora.exporting.export import export
from edgelora.exporting.recipe import Recipe, VariantRecipe
from edgelora_export.base.base import Base
from edgelora_export.plan.calibration import Calibration, Sample
from edgelora_export.plan.variants import Quantization, Variant
from edgelora_runtime.bundle.manifest import AdapterEntry
from edgelora_runtime.errors import InputError
from tests.tiny import build_variants, make_adapter, random_tokens

if TYPE_CHECKING:
    from edgelora_runtime.bundle.manifest import Manifest


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def write_rows(path: Path, count: int, mark: str = "q") -> Path:
    rows = [{"prompt": f"{mark}{n}:", "completion": f" {mark}{n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_fit_and_held_out_are_disjoint_and_repeatable(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{mark}.jsonl", 40, mark) for mark in "ab"]
    one = gather_calibration(files, encode, widest=8)
    assert one == gather_calibration(files, encode, widest=8)
    assert not set(one.fit) & set(one.held_out)
    assert len(one.fit) + len(one.held_out) == 80
    assert len(one.held_out) == 10
    assert one.sources == {path.name: hash_data(path) for path in files}


def test_only_completions_count_and_texts_count_whole(tmp_path: Path) -> None:
    rows = gather_calibration([write_rows(tmp_path / "rows.jsonl", 1)], encode, widest=8)
    (sample,) = rows.held_out
    assert "".join(map(chr, sample.tokens[sample.start :])) == " q0"
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "abc"}\n{"text": "x"}\n')
    found = gather_calibration([texts], encode, widest=8)
    assert [sample.start for sample in (*found.fit, *found.held_out)] == [1]


def test_held_out_tokens_are_counted_without_prompts_up_to_a_bound(tmp_path: Path) -> None:
    """Rows of short answers behind long prompts are judged on as many tokens as a bound on reading allows."""
    for prompt, least, most in ((3, 2048, 2060), (40, 350, 950)):
        rows = [{"prompt": f"{n:0{prompt}}", "completion": f" {n:02}"} for n in range(9000)]
        path = tmp_path / f"{prompt}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        held_out = gather_calibration([path], encode, widest=8).held_out
        assert least <= sum(len(sample.tokens) - sample.start for sample in held_out) <= most
        assert sum(len(sample.tokens) for sample in held_out) <= 8192 + 60


def test_the_budget_grows_with_the_widest_product(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 9000)
    small, large = (gather_calibration([path], encode, widest=widest).fit_tokens for widest in (8, 20000))
    assert 16384 <= small < 16500
    assert 40000 <= large < 40200


SHIPPED = Path(calibration_data.__file__).with_name(GENERAL_TEXT)
TEXTS = {json.loads(line)["text"] for line in SHIPPED.read_text(encoding="utf-8").splitlines()}


def spell(sample: Sample) -> str:
    return "".join(map(chr, sample.tokens))


def test_general_text_is_what_it_should_be() -> None:
    assert 8000 <= SHIPPED.stat().st_size <= 10_240
    assert len(TEXTS) >= 20
    assert max(map(len, TEXTS)) < 900


@pytest.mark.parametrize("rows", [100, 3000])
def test_general_text_joins_what_is_fitted_and_is_a_quarter_at_most(tmp_path: Path, rows: int) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    without = gather_calibration([path], encode, widest=8)
    found = gather_calibration([path], encode, widest=8, general_share=0.25)
    assert (found.held_out, found.spare) == (without.held_out, ())
    assert found.fit[: len(without.fit)] == without.fit
    added = found.fit[len(without.fit) :]
    tokens = sum(len(sample.tokens) for sample in added)
    assert 0.2 < tokens / found.fit_tokens <= 0.25
    assert all(any(text.startswith(spell(sample)) for text in TEXTS) for sample in added)
    assert found.sources == {**without.sources, f"edgelora/{GENERAL_TEXT}": hash_data(SHIPPED)}
    assert found == gather_calibration([path], encode, widest=8, general_share=0.25)


def test_general_text_alone_is_never_judged_on_and_spares_an_eighth() -> None:
    found = gather_calibration([], encode, widest=8, general_share=1.0)
    assert found.held_out == ()
    assert found.unseen == found.spare and len(found.spare) == len(TEXTS) // 8
    assert len(found.fit) + len(found.spare) == len(TEXTS)
    assert not set(found.fit) & set(found.spare)
    assert gather_calibration([], encode, widest=8) == Calibration()


def test_general_text_beside_the_users_own_leaves_the_judging_to_that(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "abc{n}"}}\n' for n in range(16)))
    found = gather_calibration([texts], encode, widest=8, general_share=1.0)
    assert [spell(sample)[:3] for sample in found.held_out] == ["abc", "abc"]
    assert found.spare == () and found.unseen == found.held_out
    assert len(found.fit) == 14 + len(TEXTS)


def export_blind(base: Path, adapter: Path, output: Path, **quantization: Any) -> tuple[Manifest, list[str]]:
    notes: list[str] = []
    recipe = Recipe(str(base), {"a": adapter}, {"v": VariantRecipe({"a": 1.0})}, Quantization(**quantization))
    return export(recipe, output, on_note=notes.append), notes


def test_an_adapter_without_data_is_quantized_on_general_text(
    tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, notes = export_blind(tiny_base, tiny_adapters["plain"], tmp_path / "gptq")
    variant = manifest.variants["v"]
    assert variant.fidelity is None
    assert variant.calibration is not None and set(variant.calibration.sources) == {f"edgelora/{GENERAL_TEXT}"}
    assert len(notes) == 1 and "v: " in notes[0] and "general text alone and nothing is measured" in notes[0]

    def fail(package: str) -> Path:
        raise AssertionError("general text was read")

    monkeypatch.setattr(calibration_data, "package_files", fail)
    rounded, notes = export_blind(tiny_base, tiny_adapters["plain"], tmp_path / "rtn", method="rtn")
    assert rounded.variants["v"].calibration is None and "rounded to nearest" in notes[0]
    assert set(rounded.variants["v"].graphs["cpu"].blobs) != set(variant.graphs["cpu"].blobs), "GPTQ chose other codes"
    assert export_blind(tiny_base, tiny_adapters["plain"], tmp_path / "float", bits=32)[1] == []


def test_spare_samples_turn_gptq_down_where_it_misleads(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    """Fitted on a single token, GPTQ harms every other input. Unseen samples reveal that, whether judged on or spare."""
    few = (Sample((5, 5)),)
    many = tuple(Sample(tuple(random_tokens(60, seed=seed))) for seed in range(4))
    stored = {}
    for name, calibration in {"spare": Calibration(few, spare=many), "judged": Calibration(few, many)}.items():
        base, adapter = Base.open(tiny_base), Adapter.open(tiny_adapters["plain"])
        variants = [Variant("v", {"a": 1.0}, delta=adapter, calibration=calibration)]
        manifest = build_variants(
            base, variants, tmp_path / name, quantization=Quantization(), adapters={"a": AdapterEntry("0" * 64, 4)},
            live_adapters={},
        )  # fmt: skip
        stored[name] = manifest.variants["v"].graphs["cpu"].blobs
    assert stored["spare"] == stored["judged"]


def test_a_text_file_with_something_else_in_it(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "abc"}\n{"prompt": "x"}\n')
    with pytest.raises(InputError, match="line 2 has no completion; the shape prompt-completion"):
        gather_calibration([path], encode, widest=8)


def test_training_data_are_found_while_they_are_the_same(tiny_base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 3)
    folder = tmp_path / "adapters" / "a"
    make_adapter(tiny_base, folder)
    assert find_training_data(Adapter.open(folder)) is None
    write_provenance(
        folder, Provenance("b", "0", "nf4", hash_data(data), 3, "default", 0, 4, 8.0, 1, 1e-3, data_file="../../rows.jsonl")
    )
    adapter = Adapter.open(folder)
    found = find_training_data(adapter)
    assert found is not None and found.resolve() == data
    write_rows(data, 4)
    assert find_training_data(adapter) is None
