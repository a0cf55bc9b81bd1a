"""`edgelora init` as a command: the recipe that it writes exports as it stands, and nothing is overwritten."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgelora.exporting.draft_recipe import draft_recipe
from edgelora.exporting.recipe import read_recipe
from tests.inputs.adapters import write_gguf, write_mlx

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[3]


def edgelora(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "export", "runtime"))}
    command = [sys.executable, "-m", "edgelora", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def workplace(tmp_path: Path, tiny_base: Path, tiny_adapters: Mapping[str, Path]) -> Path:
    """A folder with two adapters that name their base by its path."""
    for name in ("plain", "other"):
        shutil.copytree(tiny_adapters[name], tmp_path / "adapters" / name)
    return tmp_path


def rename_base(adapter: Path, base: object) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "base_model_name_or_path": base}), encoding="utf-8")


def test_the_recipe_exports_as_it_stands(workplace: Path, tiny_base: Path) -> None:
    done = edgelora(workplace, "init")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "next: edgelora export recipe.toml --output bundle\n"
    recipe = read_recipe(workplace / "recipe.toml")
    assert recipe.base == str(tiny_base)
    assert {name: path.relative_to(workplace).as_posix() for name, path in recipe.adapters.items()} == {
        "other": "adapters/other",
        "plain": "adapters/plain",
    }
    assert {name: dict(variant.mix) for name, variant in recipe.variants.items()} == {
        "base": {},
        "other": {"other": 1.0},
        "plain": {"plain": 1.0},
    }
    text = (workplace / "recipe.toml").read_text(encoding="utf-8")
    (workplace / "recipe.toml").write_text(
        text.replace("# [variants", "[variants").replace("# mix", "mix").replace("# kind", "kind").replace("# method", "method")
        .replace("# density", "density").replace('"gptq"', '"rtn"').replace('"repair"', '"off"'),
        encoding="utf-8",
    )  # fmt: skip
    exported = edgelora(workplace, "export", "recipe.toml", "--output", "bundle", "--json")
    assert exported.returncode == 0, exported.stderr
    variants = {each["name"]: each["kind"] for each in json.loads(exported.stdout)["variants"]}
    assert variants == dict.fromkeys(("base", "other", "plain", "mixed"), "merged") | {"all-live": "live"}, "comments hold, too"


def test_nothing_is_overwritten(workplace: Path) -> None:
    (workplace / "recipe.toml").write_text("mine", encoding="utf-8")
    done = edgelora(workplace, "init", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"] == "recipe.toml exists; name another file, or remove it first"
    assert (workplace / "recipe.toml").read_text(encoding="utf-8") == "mine"


def test_without_an_adapter_nothing_is_written(tmp_path: Path) -> None:
    done = edgelora(tmp_path, "init")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "train one with edgelora train" in done.stderr
    assert not any(tmp_path.iterdir())


def test_mlx_folders_and_gguf_files_are_found(workplace: Path) -> None:
    write_mlx(workplace / "adapters" / "plain", workplace / "mlx", "lora", 2)
    write_gguf(workplace / "adapters" / "other", workplace / "other.gguf")
    draft = draft_recipe(workplace, workplace / "recipe.toml")
    assert [each.base for each in draft.left_out] == ["mlx-community/tiny"]
    found = {each.path: (each.name, each.summary.split(",")[0]) for each in (*draft.adapters, *draft.left_out)}
    assert found == {
        "adapters/other": ("other", "PEFT"),
        "adapters/plain": ("plain", "PEFT"),
        "mlx": ("mlx", "MLX"),
        "other.gguf": (f"{workplace.name}-other", "GGUF"),
    }


def test_paths_are_those_of_the_recipes_folder(workplace: Path) -> None:
    (workplace / "recipes").mkdir()
    path = workplace / "recipes" / "first.toml"
    path.write_text(draft_recipe(workplace, path).text, encoding="utf-8")
    recipe = read_recipe(path)
    assert sorted(path.resolve() for path in recipe.adapters.values()) == [
        workplace / "adapters" / name for name in ("other", "plain")
    ]


def test_an_adapter_of_another_base_is_left_out_and_said(workplace: Path) -> None:
    shutil.copytree(workplace / "adapters" / "plain", workplace / "adapters" / "third")
    rename_base(workplace / "adapters" / "other", "someone/else")
    draft = draft_recipe(workplace, workplace / "recipe.toml")
    assert [each.name for each in draft.adapters] == ["plain", "third"]
    assert draft.notes == ("other is left out, as its base is someone/else",)
    assert '# other = "adapters/other"  # of another base, someone/else' in draft.text


def test_the_only_model_is_the_base_of_adapters_that_name_none(workplace: Path) -> None:
    for name in ("plain", "other"):
        rename_base(workplace / "adapters" / name, None)
    assert draft_recipe(workplace, workplace / "recipe.toml").base is None
    shutil.copytree(workplace / "adapters" / "plain", workplace / "model", ignore=shutil.ignore_patterns("adapter*"))
    (workplace / "model" / "config.json").write_text("{}", encoding="utf-8")
    assert draft_recipe(workplace, workplace / "recipe.toml").base == "model"


def test_an_adapter_called_base_is_no_second_variant_of_that_name(workplace: Path) -> None:
    (workplace / "adapters" / "plain").rename(workplace / "adapters" / "base")
    path = workplace / "recipe.toml"
    path.write_text(draft_recipe(workplace, path).text, encoding="utf-8")
    assert sorted(read_recipe(path).variants) == ["adapters-base", "base", "other"]


def test_hostile_names_stay_text(workplace: Path) -> None:
    """Neither a name of a folder nor that of a base ends a string of the recipe, or reaches the terminal."""
    odd = workplace / 'x"]\nbase = "evil'
    (workplace / "adapters" / "plain").rename(odd)
    rename_base(odd, 'a"\nbase = "evil" \x1b[31m')
    rename_base(workplace / "adapters" / "other", 'who"ever/\\x')
    done = edgelora(workplace, "init")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).replace("\n", "").isprintable()
    recipe = read_recipe(workplace / "recipe.toml")
    assert recipe.base == 'who"ever/\\x'
    assert sorted(recipe.adapters) == ["other", "x-base-evil"]
    assert recipe.adapters["x-base-evil"].resolve() == odd.resolve()


def test_a_broken_adapter_is_named_and_left_out(workplace: Path) -> None:
    (workplace / "adapters" / "plain" / "adapter_model.safetensors").write_bytes(b"broken")
    draft = draft_recipe(workplace, workplace / "recipe.toml")
    assert [each.name for each in draft.adapters] == ["other"]
    assert draft.notes[0].startswith("adapters/plain is left out: ")
