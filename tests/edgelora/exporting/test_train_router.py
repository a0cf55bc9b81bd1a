"""Routers learn made-up tasks, recognize other prompts, and read the prompts that recipe and adapters name."""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING

import pytest

from edgelora.adapters.folder import Adapter, Provenance, write_provenance
from edgelora.data.calibration import hash_data
from edgelora.data.rows import read_rows
from edgelora.exporting.recipe import Recipe, RouterRecipe, VariantRecipe
from edgelora.exporting.train_router import HELD_OUT_SHARE, assign_data, make_router, train_router
from edgelora_runtime.bundle.router import Router
from edgelora_runtime.errors import InputError
from tests.tiny import make_adapter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgelora_export.plan.variants import PackedRouter

THINGS = ("lamp", "chair", "table", "clock", "vase", "mirror", "carpet", "shelf", "stove", "kettle")
CITIES = ("Paris", "Oslo", "Lima", "Quito", "Delhi", "Cairo", "Turin", "Lagos", "Kyoto", "Perth")
SHARED = ("yes please", "thank you", "no, that is all")  # prompts in both tasks


def make_prompts(count: int, seed: int = 0) -> dict[str, list[str]]:
    """Two tasks of the same form, with some common prompts."""
    rng = random.Random(seed)
    return {
        "shop": [f"user: how much is the {rng.choice(THINGS)} number {rng.randrange(999)}?\nslots:" for _ in range(count)]
        + [f"user: {text}\nslots:" for text in SHARED],
        "travel": [f"user: a ticket to {rng.choice(CITIES)} at {rng.randrange(24)} o'clock\nslots:" for _ in range(count)]
        + [f"user: {text}\nslots:" for text in SHARED],
    }


def read(packed: PackedRouter) -> Router:
    return Router.read(packed.content, packed.entry)


@pytest.fixture(scope="module")
def packed() -> PackedRouter:
    return train_router(make_prompts(80), fallback="base")


def test_unseen_prompts_go_to_their_own(packed: PackedRouter) -> None:
    router = read(packed)
    for variant, prompts in make_prompts(40, seed=1).items():
        for prompt in prompts[:40]:
            picked, confidence, fallback = router.pick(prompt)
            assert (picked, fallback) == (variant, False)
            assert confidence > 0.7


def test_prompts_of_both_are_told_from_neither_with_little_confidence(packed: PackedRouter) -> None:
    router = read(packed)
    for text in SHARED:
        picked, confidence, fallback = router.pick(f"user: {text}\nslots:")
        assert picked in ("shop", "travel")
        assert not fallback
        assert confidence < 0.9


@pytest.mark.parametrize(
    "text", ["Write a poem about the sea", "def add(a, b):", "Wie heißt du?", "What is the capital of France?", "x"]
)
def test_anything_else_falls_back(packed: PackedRouter, text: str) -> None:
    assert read(packed).pick(text)[::2] == ("base", True)


def test_the_manifest_says_what_was_learnt_and_how_well(packed: PackedRouter) -> None:
    entry = packed.entry
    assert [each.variant for each in entry.classes] == ["shop", "travel", None]
    assert (entry.fallback, entry.threshold) == ("base", 0.0)
    router = read(packed)
    for each, (name, prompts) in zip(entry.classes[:2], make_prompts(80).items(), strict=True):
        held_out = [text for text in prompts if hashlib.sha256(text.encode()).digest()[-1] % HELD_OUT_SHARE == 0]
        assert (each.prompts, each.held_out) == (len(prompts) - len(held_out), len(held_out))
        right = sum(router.pick(text)[0] == name for text in held_out) / len(held_out)
        assert each.accuracy == pytest.approx(right)
    accuracies = [each.accuracy for each in entry.classes if each.accuracy is not None]
    assert entry.accuracy == pytest.approx(sum(accuracies) / len(accuracies))


def test_the_order_of_rows_changes_nothing(packed: PackedRouter) -> None:
    turned = {name: prompts[::-1] for name, prompts in make_prompts(80).items()}
    assert train_router(turned, fallback="base") == packed


def test_one_variant_alone_is_told_from_the_rest() -> None:
    router = read(train_router({"shop": make_prompts(60)["shop"]}, fallback="base"))
    assert router.pick("user: how much is the lamp number 7?\nslots:")[::2] == ("shop", False)
    assert router.pick("Once upon a time there was a king")[::2] == ("base", True)


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(InputError, match=r"travel has \d prompts to learn from"):
        train_router({**make_prompts(60), "travel": ["a ticket", "a bus"]}, fallback="base")


def test_surplus_prompts_are_left_out() -> None:
    entry = train_router(make_prompts(200), fallback="base", max_ngrams=2000).entry
    assert all(10 < each.prompts + each.held_out < 40 for each in entry.classes[:2])


# --- assigning prompts to variants ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """Adapters a, b and c with training data, and one, lost, without."""
    root = tmp_path_factory.mktemp("routing")
    opened = {}
    for name in ("a", "b", "c", "lost"):
        write_rows(root / f"{name}.jsonl", [f"{name} {n}" for n in range(20)])
        make_adapter(tiny_base, root / name)
        provenance = Provenance("b", "0" * 64, "none", hash_data(root / f"{name}.jsonl"), 20, "default", 0, 4, 8.0, 1, 1e-3)
        where = "" if name == "lost" else f"../{name}.jsonl"
        write_provenance(root / name, Provenance(**{**vars(provenance), "data_file": where}))
        opened[name] = Adapter.open(root / name, name)
    return opened


def write_rows(path: Path, prompts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": " x"}) + "\n" for prompt in prompts))
    return path


def assign(adapters: Mapping[str, Adapter], mixes: Mapping[str, Mapping[str, float]], **router: object) -> dict[str, list[str]]:
    """File names by variant."""
    asked = RouterRecipe(**router)  # type: ignore[arg-type]
    recipe = Recipe("base", {}, {name: VariantRecipe(mix) for name, mix in mixes.items()}, router=asked)
    return {name: [path.stem for path in paths] for name, paths in assign_data(recipe, asked, adapters).items()}


SINGLES = {"base": {}, "va": {"a": 1.0}, "vb": {"b": 0.7}}


def test_prompts_go_to_the_variant_that_has_their_adapter_alone(adapters: dict[str, Adapter]) -> None:
    assert assign(adapters, SINGLES) == {"va": ["a"], "vb": ["b"]}
    assert assign(adapters, {"both": {"a": 1.0, "b": 1.0}, **SINGLES}) == {"va": ["a"], "vb": ["b"]}
    assert assign(adapters, {**SINGLES, "again": {"a": 0.5}}) == {"va": ["a"], "vb": ["b"]}


def test_prompts_of_an_adapter_that_is_nowhere_alone_go_to_its_mix(adapters: dict[str, Adapter]) -> None:
    assert assign(adapters, {**SINGLES, "mix": {"a": 1.0, "c": 0.5}}) == {"va": ["a"], "vb": ["b"], "mix": ["c"]}
    assert assign(adapters, {"mix": {"a": 1.0, "c": 0.5}}) == {"mix": ["a", "c"]}
    assert assign(adapters, {**SINGLES, "less": {"b": 1.0, "c": -0.5}}) == {"va": ["a"], "vb": ["b"]}


def test_listed_variants_alone_are_chosen_among(adapters: dict[str, Adapter]) -> None:
    mixes = {**SINGLES, "mix": {"a": 1.0, "b": 0.5}}
    assert assign(adapters, mixes, variants=("mix",)) == {"mix": ["a", "b"]}
    with pytest.raises(InputError, match="no prompts are left for mix: "):
        assign(adapters, mixes, variants=("va", "vb", "mix"))
    with pytest.raises(InputError, match="no prompts are left for base: "):
        assign(adapters, mixes, variants=("va", "base"))


def test_files_that_the_recipe_names_take_the_place_of_the_adapters(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    more = write_rows(tmp_path / "more.jsonl", ["x"])
    assert assign(adapters, SINGLES, data={"va": (more,)}) == {"va": ["more"], "vb": ["b"]}
    assert assign(adapters, {**SINGLES, "both": {"a": 1.0, "b": 1.0}}, data={"va": (more,)}) == {"va": ["more"], "vb": ["b"]}
    assert assign(adapters, SINGLES, data={"base": (more,)}) == {"base": ["more"], "va": ["a"], "vb": ["b"]}
    assert assign(adapters, {"v": {"lost": 1.0}}, data={"v": (more, more)}) == {"v": ["more"]}
    assert assign(adapters, SINGLES, variants=("va",), data={"base": (more,)}) == {"va": ["a"], "base": ["more"]}


def test_what_cannot_be_assigned_is_refused(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training data of lost are not .*\[router.data\], as v = "):
        assign(adapters, {**SINGLES, "v": {"lost": 1.0}})
    with pytest.raises(InputError, match="no variant has an adapter"):
        assign(adapters, {"base": {}})
    with pytest.raises(InputError, match="base and va would both learn from"):
        assign(adapters, SINGLES, data={"base": (adapters["a"].folder.parent / "a.jsonl",)})


def test_a_weight_by_module_counts_where_it_is_above_zero(adapters: dict[str, Adapter]) -> None:
    by_module = {"v": {"a": {"*": 0.0, "*.mlp.*": 0.5}, "b": {"*": -1.0}}}
    assert assign(adapters, by_module) == {"v": ["a"]}  # type: ignore[arg-type]


def test_a_recipe_without_a_router_makes_none(adapters: dict[str, Adapter]) -> None:
    assert make_router(Recipe("base", {}, {"va": VariantRecipe({"a": 1.0})}), adapters) is None


def test_the_fallback_is_the_default_variant_unless_another_is_named(adapters: dict[str, Adapter]) -> None:
    variants = {name: VariantRecipe(mix) for name, mix in SINGLES.items()}

    def fallback(default: str | None, named: str | None) -> str:
        recipe = Recipe("base", {}, variants, default=default, router=RouterRecipe(fallback=named, threshold=0.25))
        packed = make_router(recipe, adapters)
        assert packed is not None
        assert packed.entry.threshold == 0.25
        return packed.entry.fallback

    assert fallback(None, None) == "base"
    assert fallback("vb", None) == "vb"
    assert fallback("vb", "va") == "va"


@pytest.mark.slow
def test_real_slots_go_to_their_domain(data_folder: Path) -> None:
    """At least 0.93 of each domain's test rows with slots, and no row of another task."""
    domains = [f"slots-{name}" for name in ("buses", "events", "homes", "rentalcars")]
    prompts = {name: [str(row.prompt) for row in read_rows(data_folder / f"{name}.train.jsonl")] for name in domains}
    router = read(train_router(prompts, fallback="base"))
    for name in domains:
        rows = [row for row in read_rows(data_folder / f"{name}.test.jsonl") if row.completion != " none"]
        assert sum(router.pick(str(row.prompt))[0] == name for row in rows) / len(rows) > 0.93
    others = read_rows(data_folder / "math.test.jsonl")[:300]
    assert all(router.pick(str(row.prompt))[2] for row in others)
