"""KV caches of earlier requests: which one a request gets, their budget, and saving them to disk."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from edgelora_runtime import InputError, ResourceError, Runtime
from edgelora_runtime.bundle.choice import Choice
from edgelora_runtime.bundle.manifest import ModelEntry
from edgelora_runtime.residency.prompt_cache import PromptCache
from edgelora_runtime.session.growing_cache import GrowingCache
from edgelora_runtime.session.in_place_cache import InPlaceCache
from tests.runtime.test_runtime import generate_alone
from tests.tiny import random_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from edgelora_runtime.session.kv_cache import KVCache

FLOAT32 = np.dtype(np.float32)
ENTRY = ModelEntry("llama", 8, 2, 2, 4, 50, 512, (1,))
KINDS = (InPlaceCache, GrowingCache)
CHOICE, OTHER = Choice("a", "a.onnx", None), Choice("b", "b.onnx", None)


def fill(cache: KVCache, tokens: list[int], seed: int = 0) -> dict[str, Any]:
    """Fills a cache with random keys and values for tokens; returns them."""
    generator = np.random.default_rng(seed)
    names = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    state = {name: generator.standard_normal((2, len(tokens), 4)).astype(np.float32) for name in names}
    cache.restore(tokens, state)
    return state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 7, 300])
def test_a_state_is_restored_and_survives_growth(kind: type[Any], count: int) -> None:
    cache = kind(ENTRY, FLOAT32)
    state = fill(cache, list(range(count)))
    for _ in range(2):
        assert cache.tokens == list(range(count))
        for name, array in cache.state(count).items():
            np.testing.assert_array_equal(array, state[name])
        cache.reserve(512)
    shorter = kind(ENTRY, FLOAT32)
    shorter.restore([0], cache.state(1))
    np.testing.assert_array_equal(shorter.state(1)["1.value"], state["1.value"][:, :1])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_written(kind: type[Any]) -> None:
    cache = kind(ENTRY, FLOAT32)
    assert cache.bytes == 0
    fill(cache, list(range(10)))
    assert cache.bytes == (1 if kind is InPlaceCache else 2) * 10 * 2 * 2 * 2 * 4 * 4
    before = cache.bytes
    cache.rewind(3)
    assert cache.bytes == before, "written memory stays"


def make_cache(tokens: list[int]) -> KVCache:
    cache = InPlaceCache(ENTRY, FLOAT32)
    if tokens:
        fill(cache, tokens)
    return cache


def test_the_longest_prefix_of_the_same_choice_wins() -> None:
    prompts = PromptCache()
    short, long, foreign = make_cache([1, 2, 9]), make_cache([1, 2, 3, 4]), make_cache([1, 2, 3, 4, 5])
    for choice, cache in ((CHOICE, short), (CHOICE, long), (OTHER, foreign)):
        prompts.put(choice, cache)
    assert prompts.take(CHOICE, [1, 2, 3, 4, 5], lambda: make_cache([])) is long
    assert prompts.take(CHOICE, [1, 2, 3, 4, 5], lambda: make_cache([])) is short, "the long one is in use"
    assert prompts.take(CHOICE, [1, 2, 3], lambda: make_cache([])).tokens == []
    assert prompts.count_tokens(OTHER) == 5


def test_a_cache_that_would_drop_more_than_the_request_uses_is_copied() -> None:
    prompts = PromptCache()
    conversation = make_cache(list(range(40)))
    prompts.put(CHOICE, conversation)
    copy = prompts.take(CHOICE, [*range(10), 49, 48], lambda: make_cache([]))
    assert copy is not conversation
    assert copy.tokens == list(range(10))
    np.testing.assert_array_equal(copy.state(10)["0.key"], conversation.state(10)["0.key"])
    assert prompts.take(CHOICE, [*range(40), 7], lambda: make_cache([])) is conversation
    assert conversation.tokens == list(range(40))


@pytest.mark.parametrize("kind", KINDS)
def test_an_idle_cache_holds_no_logits(kind: type[Any]) -> None:
    cache, prompts = kind(ENTRY, FLOAT32), PromptCache()
    cache.logits = np.zeros((1, 9, 50), np.float32)
    prompts.put(CHOICE, cache)
    assert cache.logits.shape == (1, 0, 50)


def test_a_longer_cache_replaces_its_prefix() -> None:
    prompts = PromptCache()
    for tokens in ([1, 2, 3], [4], [1, 2, 3, 4], [1, 2, 5]):
        prompts.put(CHOICE, make_cache(tokens))
    assert sorted(saved.tokens for saved in prompts.copy()) == [(1, 2, 3, 4), (1, 2, 5), (4,)]


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(0, 4000))
def test_the_budget_holds_and_the_newest_stay(lengths: list[int], budget: int) -> None:
    prompts = PromptCache(budget)
    position = 2 * 2 * 2 * 4 * 4
    for number, length in enumerate(lengths):
        prompts.put(CHOICE, make_cache([number, *range(20, 19 + length)]))
        assert prompts.bytes <= budget
    kept, room = [], budget
    for number, length in reversed(list(enumerate(lengths))):
        if length * position > room:
            break
        room -= length * position
        kept.append(number)
    assert [saved.tokens[0] for saved in prompts.copy()] == kept[::-1]


# --- with a bundle ----------------------------------------------------------------------------------------------------------


def test_switching_away_and_back_reads_nothing_again(bundle32: Path) -> None:
    prompt = random_tokens(60, seed=1)
    with Runtime(bundle32, threads=1) as runtime:
        first = runtime.generate(prompt, variant="plain", max_tokens=5)
        for variant in ("base", "ties", "plain-live"):
            assert runtime.generate(prompt, variant=variant, max_tokens=5).reused_tokens == 0
        again = runtime.generate(prompt, variant="plain", max_tokens=5)
        assert again.reused_tokens == 59
        assert again.tokens == first.tokens


def test_two_conversations_with_a_common_prefix_both_stay_cached(bundle32: Path) -> None:
    start, (left, right) = random_tokens(10), (random_tokens(40, seed=seed) for seed in (2, 3))
    with Runtime(bundle32, threads=1) as runtime:
        for _ in range(2):
            for end in (left, right):
                found = runtime.generate(start + end, variant="base", max_tokens=8)
                assert found.tokens == generate_alone(bundle32, start + end, variant="base", max_tokens=8)
        assert found.reused_tokens == 49
        assert runtime.generate(start + left, variant="base", max_tokens=1).reused_tokens == 49


def test_a_budget_of_zero_keeps_no_prompts(bundle32: Path) -> None:
    with Runtime(bundle32, threads=1, cache_budget=0) as runtime:
        for _ in range(2):
            assert runtime.generate(random_tokens(20), max_tokens=3).reused_tokens == 0
        assert runtime.memory.kv_caches == 0


def test_a_variant_and_a_mix_that_compute_the_same_share_their_prompts(bundle32: Path) -> None:
    with Runtime(bundle32, threads=1) as runtime:
        weights = runtime.variants["plain-live"].live
        runtime.generate(random_tokens(20), variant="plain-live", max_tokens=2)
        assert runtime.generate(random_tokens(20), mix=weights, max_tokens=2).reused_tokens == 19


# --- on disk ----------------------------------------------------------------------------------------------------------------


def test_prompts_survive_a_round_trip_to_disk(bundle32: Path, tmp_path: Path) -> None:
    prompt, file = random_tokens(50, seed=4), tmp_path / "prompts.safetensors"
    arguments: list[dict[str, Any]] = [{"variant": "base"}, {"variant": "plain"}, {"mix": {"plain": 0.5, "other": -0.8}}]
    with Runtime(bundle32, threads=1) as runtime:
        expected = [runtime.generate(prompt, max_tokens=10, **each).tokens for each in arguments]
        assert runtime.save_prompts(file) == 3
    with Runtime(bundle32, threads=1) as runtime:
        assert runtime.load_prompts(file) == 3
        assert runtime.memory.graphs == (), "loading prompts loads no model"
        for each, tokens in zip(arguments, expected, strict=True):
            found = runtime.generate(prompt, max_tokens=10, **each)
            assert found.reused_tokens == 49
            assert found.tokens == tokens
        assert runtime.generate(prompt, variant="ties", max_tokens=1).reused_tokens == 0
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_prompts_of_another_bundle_are_left_out(bundle32: Path, bundle4: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.safetensors"
    with Runtime(bundle4, threads=1) as runtime:
        runtime.generate(random_tokens(9), max_tokens=2)
        assert runtime.save_prompts(file) == 1
    with Runtime(bundle32, threads=1) as runtime:
        assert runtime.load_prompts(file) == 0


def test_a_failed_write_leaves_the_earlier_file(bundle32: Path, tmp_path: Path) -> None:
    with Runtime(bundle32, threads=1) as runtime, pytest.raises(ResourceError, match="cannot be written"):
        runtime.save_prompts(tmp_path / "nowhere" / "prompts")


def damage(file: Path, how: str) -> None:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        metadata = json.loads(opened.read(length))["__metadata__"]
    tensors = load_file(file)
    entries = json.loads(metadata["prompts"])
    if how == "format":
        metadata["format"] = "edgelora prompts 99"
    elif how == "tokens":
        entries[0]["tokens"][0] = 5000
    elif how == "no number":
        entries[0]["tokens"][0] = "5"
    elif how == "too few":
        entries[0]["tokens"] = entries[0]["tokens"][:-1]
    elif how == "none":
        entries[0]["tokens"] = []
    elif how == "lacks":
        del tensors["0.0.key"]
    elif how == "infinite":
        tensors["0.0.key"][0, 0, 0] = np.inf
    elif how == "type":
        tensors["0.0.key"] = tensors["0.0.key"].astype(np.int32)
    elif how == "no list":
        entries = {"a": 1}
    save_file(tensors, file, {**metadata, "prompts": json.dumps(entries)})
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif how == "text":
        file.write_text("no")


@pytest.mark.parametrize(
    "how", ["format", "tokens", "no number", "too few", "none", "lacks", "infinite", "type", "no list", "cut", "text"]
)
def test_a_damaged_file_is_refused(bundle32: Path, tmp_path: Path, how: str) -> None:
    file = tmp_path / "prompts.safetensors"
    with Runtime(bundle32, threads=1) as runtime:
        runtime.generate(random_tokens(9), max_tokens=2)
        runtime.save_prompts(file)
        damage(file, how)
        with pytest.raises(InputError, match="prompts"):
            runtime.load_prompts(file)


def test_a_missing_file_is_refused(bundle32: Path, tmp_path: Path) -> None:
    with Runtime(bundle32, threads=1) as runtime, pytest.raises(InputError, match="cannot be read"):
        runtime.load_prompts(tmp_path / "none")
