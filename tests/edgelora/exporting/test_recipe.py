"""Recipes are read strictly, with all mistakes in one message."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edgelora.exporting.recipe import Recipe, RouterRecipe, VariantRecipe, parse_recipe, read_recipe
from edgelora_export.plan.variants import Quantization
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from edgelora.mix.weights import Weight

GOOD = """\
base = "some/model"
default = "clinic"
context_length = 2048
targets = ["cpu", "gpu"]
merge_base = "float"
[adapters]
sql = "adapters/sql"
medical = "/elsewhere/medical"
[quantization]
bits = 8
block_size = 64
symmetric = false
method = "rtn"
[variants.base]
mix = {}
[variants.sql]
mix = { sql = 1 }
[variants.clinic]
mix = { sql = 0.6, medical = -0.6 }
method = "ties"
density = 0.3
merge_base = "trained"
[variants.sql-live]
mix = { sql = 1.0 }
kind = "live"
[router]
variants = ["sql", "clinic"]
fallback = "base"
threshold = 0.5
[router.data]
sql = "rows.jsonl"
clinic = ["a.jsonl", "/b.jsonl"]
"""


def parse(text: str) -> Recipe:
    return parse_recipe(tomllib.loads(text), Path("folder"))


def test_a_good_recipe() -> None:
    assert parse(GOOD) == Recipe(
        base="some/model",
        adapters={"sql": Path("folder/adapters/sql"), "medical": Path("/elsewhere/medical")},
        variants={
            "base": VariantRecipe({}),
            "sql": VariantRecipe({"sql": 1}),
            "clinic": VariantRecipe({"sql": 0.6, "medical": -0.6}, "merged", "ties", 0.3, "trained"),
            "sql-live": VariantRecipe({"sql": 1.0}, "live"),
        },
        quantization=Quantization(8, 64, symmetric=False, method="rtn"),
        default="clinic",
        context_length=2048,
        targets=("cpu", "gpu"),
        merge_base="float",
        router=RouterRecipe(
            ("sql", "clinic"),
            "base",
            0.5,
            {"sql": (Path("folder/rows.jsonl"),), "clinic": (Path("folder/a.jsonl"), Path("/b.jsonl"))},
        ),
    )


def test_weights_by_module_and_a_seed() -> None:
    mix = '{ sql = 0.6, medical = { "*" = 0.6, "model.layers.0.*" = 0.2 } }'
    text = GOOD.replace("{ sql = 0.6, medical = -0.6 }", mix).replace('"ties"', '"dare_ties"\nseed = 7')
    expected: dict[str, Weight] = {"sql": 0.6, "medical": {"*": 0.6, "model.layers.0.*": 0.2}}
    assert parse(text).variants["clinic"] == VariantRecipe(expected, "merged", "dare_ties", 0.3, "trained", 7)


def test_what_is_left_out_has_defaults() -> None:
    recipe = parse('base = "m"\n[variants.base]\nmix = {}\n')
    assert recipe == Recipe("m", {}, {"base": VariantRecipe({})}, Quantization(4, 32, symmetric=True, method="gptq"))
    assert recipe.targets == ("cpu",)
    assert recipe.router is None
    assert parse('base = "m"\n[variants.base]\n[router]\n').router == RouterRecipe()
    assert parse('base = "m"\n[variants.base]\n').variants == {"base": VariantRecipe({})}


def test_a_base_beside_the_recipe_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "r.toml").write_text('base = "model"\n[variants.base]\n')
    assert read_recipe(tmp_path / "r.toml").base == str(tmp_path / "model")


def with_line(line: str) -> str:
    """The good recipe with an added top-level line, or lines that start a table."""
    return f"{line}\n{GOOD}" if not line.startswith("[") else f"{GOOD}\n{line}"


MISTAKES: dict[str, tuple[str, str]] = {
    "unknown key": (with_line("colour = 1"), "colour is not a known key"),
    "unknown quantization key": (GOOD.replace("bits = 8", "bits = 8\nfoo = 1"), "quantization.foo"),
    "unknown variant key": (with_line("[variants.x]\nmix = {}\nweights = 1"), "variants.x.weights"),
    "no base": (GOOD.replace('base = "some/model"\n', ""), "base is missing"),
    "base of another type": (GOOD.replace('base = "some/model"', "base = 3"), "base = 3 has the wrong type"),
    "no variants": ('base = "m"', "variants is missing"),
    "variants of another type": ('base = "m"\nvariants = 3', "variants = 3"),
    "variant that is no table": ('base = "m"\nvariants = { x = 3 }', "variants.x is not a table"),
    "adapter that is no path": (GOOD.replace('sql = "adapters/sql"', "sql = 3"), "adapters.sql = 3 is not a path"),
    "adapter name": (GOOD.replace("medical =", '"a/b" =', 1), "adapters.a/b"),
    "reserved variant": (with_line("[variants.live]\nmix = {}"), "variants.live: the name is reserved"),
    "variant that is a device": (with_line("[variants.nul]\nmix = {}"), "variants.nul"),
    "variant with a slash": (with_line('[variants."a/b"]\nmix = {}'), "variants.a/b"),
    "unknown adapter": (GOOD.replace("{ sql = 1 }", "{ sqk = 1 }"), "variants.sql.mix names sqk"),
    "weight as text": (GOOD.replace("{ sql = 1 }", '{ sql = "1" }'), "variants.sql.mix.sql = '1' is not a weight"),
    "weight as truth": (GOOD.replace("{ sql = 1 }", "{ sql = true }"), "is not a weight"),
    "weight that is no number": (GOOD.replace("{ sql = 1 }", "{ sql = nan }"), "variants.sql.mix.sql = nan"),
    "infinite live weight": (GOOD.replace("{ sql = 1.0 }", "{ sql = inf }"), "variants.sql-live.mix.sql = inf"),
    "unknown method": (GOOD.replace('"ties"', '"median"'), "variants.clinic.method = 'median'"),
    "unknown kind": (GOOD.replace('"live"', '"lively"'), "kind = 'lively'"),
    "live without a mix": (with_line('[variants.x]\nmix = {}\nkind = "live"'), "variants.x.kind = 'live' needs a mix"),
    "live ties": (with_line('[variants.x]\nmix = { sql = 1 }\nkind = "live"\nmethod = "ties"'), "edgelora compose"),
    "weights by module without a pattern": (GOOD.replace("{ sql = 1 }", "{ sql = {} }"), "variants.sql.mix.sql = {} is empty"),
    "weight by module as text": (GOOD.replace("{ sql = 1 }", '{ sql = { "*" = "1" } }'), """variants.sql.mix.sql."*" = '1'"""),
    "live by module": (GOOD.replace("{ sql = 1.0 }", '{ sql = { "*" = 1.0 } }'), "gives sql weights by module, but a live"),
    "density for nothing": (with_line("[variants.x]\nmix = { sql = 1 }\ndensity = 0.3"), "variants.x.density has no effect"),
    "seed for nothing": (GOOD.replace("density = 0.3", "seed = 3"), "variants.clinic.seed has no effect on method ties"),
    "seed as text": (GOOD.replace("density = 0.3", 'seed = "3"'), "variants.clinic.seed = '3' has the wrong type"),
    "negative seed": (GOOD.replace('"ties"', '"dare_ties"\nseed = -1'), "variants.clinic.seed = -1"),
    "density as text": (GOOD.replace("density = 0.3", 'density = "0.3"'), "density"),
    "density out of range": (GOOD.replace("density = 0.3", "density = 1.3"), "density"),
    "bits": (GOOD.replace("bits = 8", "bits = 5"), "quantization: bits = 5"),
    "bits as truth": (GOOD.replace("bits = 8", "bits = true"), "quantization.bits = True"),
    "block size": (GOOD.replace("block_size = 64", "block_size = 48"), "block_size = 48"),
    "symmetric as a number": (GOOD.replace("symmetric = false", "symmetric = 0"), "symmetric = 0"),
    "unknown quantization method": (GOOD.replace('method = "rtn"', 'method = "awq"'), "awq"),
    "unknown default": (GOOD.replace('default = "clinic"', 'default = "x"'), "default = 'x'"),
    "targets as text": (GOOD.replace('["cpu", "gpu"]', '"gpu"'), "targets = 'gpu' has the wrong type"),
    "targets without cpu": (GOOD.replace('["cpu", "gpu"]', '["gpu"]'), "targets = ['gpu']: use cpu and gpu"),
    "unknown target": (GOOD.replace('"gpu"', '"npu"'), "'npu'"),
    "target that is no name": (GOOD.replace('"gpu"', "[1]"), "targets = ['cpu', [1]]"),
    "unknown merge base": (GOOD.replace('merge_base = "float"', 'merge_base = "nf4"'), "merge_base = 'nf4': use one of auto"),
    "unknown merge base of one": (GOOD.replace('"trained"', '"own"'), "variants.clinic.merge_base = 'own'"),
    "merge base of another type": (GOOD.replace('"trained"', "4"), "variants.clinic.merge_base = 4 has the wrong type"),
    "live on a trained base": (GOOD.replace('"live"', '"live"\nmerge_base = "trained"'), "variants.sql-live.merge_base"),
    "nothing to merge": (with_line('[variants.x]\nmerge_base = "trained"'), "variants.x.merge_base = 'trained' is for a merged"),
    "router of another type": (GOOD[: GOOD.index("[router]")].replace("[adapters]", "router = 3\n[adapters]"), "router = 3"),
    "unknown router key": (GOOD.replace("threshold = 0.5", "limit = 0.5"), "router.limit is not a known key"),
    "router of an unknown variant": (GOOD.replace('["sql", "clinic"]', '["sqk"]'), "router.variants names 'sqk'"),
    "router of something else": (GOOD.replace('["sql", "clinic"]', "[[1]]"), "router.variants names [1]"),
    "router of nothing": (GOOD.replace('["sql", "clinic"]', "[]"), "router.variants is empty"),
    "unknown fallback": (GOOD.replace('fallback = "base"', 'fallback = "x"'), "router.fallback = 'x'"),
    "threshold out of range": (GOOD.replace("threshold = 0.5", "threshold = 1.5"), "router.threshold = 1.5"),
    "threshold as text": (GOOD.replace("threshold = 0.5", 'threshold = "high"'), "router.threshold = 'high'"),
    "data of an unknown variant": (GOOD.replace('sql = "rows.jsonl"', 'sqk = "rows.jsonl"'), "router.data names 'sqk'"),
    "data that is no file": (GOOD.replace('sql = "rows.jsonl"', "sql = 3"), "router.data.sql = 3 is neither a file"),
    "data that is no list of files": (GOOD.replace('"/b.jsonl"]', "3]"), "router.data.clinic = ['a.jsonl', 3]"),
    "no data": (GOOD.replace('["a.jsonl", "/b.jsonl"]', "[]"), "router.data.clinic = []"),
    "context as text": (GOOD.replace("context_length = 2048", 'context_length = "2048"'), "context_length"),
}


@pytest.mark.parametrize(("text", "mention"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named(text: str, mention: str) -> None:
    assert text != GOOD
    with pytest.raises(InputError) as caught:
        parse(text)
    assert mention in str(caught.value)


def test_all_mistakes_are_in_one_message() -> None:
    text = GOOD.replace("bits = 8", "bits = 5").replace('"ties"', '"median"').replace("{ sql = 1 }", "{ sqk = 1 }")
    with pytest.raises(InputError) as caught:
        parse(f"colour = 1\n{text}")
    for mention in ("colour", "bits = 5", "median", "sqk"):
        assert mention in str(caught.value)


@pytest.mark.parametrize("raw", [b"base = ", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_no_toml(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(raw)
    with pytest.raises(InputError, match="not readable TOML"):
        read_recipe(tmp_path / "r.toml")


def test_a_base_that_no_system_can_look_up() -> None:
    with pytest.raises(InputError, match="cannot be looked up"):
        parse(f'base = "{"a" * 5000}"\n[variants.base]\nmix = {{}}\n')


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_recipe(tmp_path / "r.toml")
