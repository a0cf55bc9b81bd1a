"""Packed weights on disk: the same answers from mapped files, and when entries are made, kept, refused and deleted."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
import pytest

from edgelora_runtime import Bundle, IntegrityError, PackedCache, Runtime, UsageError
from edgelora_runtime.residency import packed_cache as module
from tests.tiny import random_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgelora_runtime.session.factors import LoraInputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "packed"


@pytest.fixture
def mapped(bundle4: Path, folder: Path) -> Iterator[Runtime]:
    with Runtime(bundle4, threads=1, kernels="onnxruntime", packed_cache=PackedCache(folder)) as runtime:
        yield runtime


def entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def test_mapped_weights_give_the_same_logits(bundle4: Path, mapped: Runtime) -> None:
    tokens = random_tokens(12, seed=1)
    with Runtime(bundle4, threads=1, kernels="onnxruntime") as plain:
        for variant in plain.variants:
            for _ in range(2):  # just written, then found
                np.testing.assert_array_equal(mapped.logits(tokens, variant=variant), plain.logits(tokens, variant=variant))
                mapped.close()


def test_mixes_of_live_adapters_run_on_mapped_weights(bundle4: Path, mapped: Runtime) -> None:
    tokens = random_tokens(9, seed=2)
    mix = {"plain": 0.5, "other": -0.7}
    with Runtime(bundle4, threads=1, kernels="onnxruntime") as plain:
        np.testing.assert_array_equal(mapped.logits(tokens, mix=mix), plain.logits(tokens, mix=mix))


def test_live_variants_are_mapped_and_other_mixes_made(bundle4: Path, mapped: Runtime, folder: Path) -> None:
    tokens = random_tokens(9, seed=2)
    live = [name for name, entry in mapped.variants.items() if entry.kind == "live" and entry.live]
    with Runtime(bundle4, threads=1, kernels="onnxruntime") as plain:
        for variant in live:
            expected = plain.logits(tokens, variant=variant)
            for _ in range(3):  # written, kept, then found
                np.testing.assert_array_equal(mapped.logits(tokens, variant=variant), expected)
            mapped.close()
            np.testing.assert_array_equal(mapped.logits(tokens, variant=variant), expected)
            assert mapped.memory.live == 0
    count = len(entries(folder))
    mapped.logits(tokens, mix={"plain": 0.123})
    assert mapped.memory.live > 0
    assert len(entries(folder)) == count


def test_mapped_inputs_equal_those_of_the_adapter_file(bundle4: Path, mapped: Runtime, folder: Path) -> None:
    variant = next(name for name, entry in mapped.variants.items() if entry.kind == "live" and entry.live)
    mapped.logits([1, 2], variant=variant)
    inputs = next(entry for entry in entries(folder) if (entry / module.INPUTS).exists())
    (inputs / module.SHAPES).write_text("{}" + " " * ((inputs / module.SHAPES).stat().st_size - 2), encoding="utf-8")
    with (
        Runtime(bundle4, threads=1, kernels="onnxruntime") as plain,
        Runtime(bundle4, threads=1, kernels="onnxruntime", packed_cache=PackedCache(folder)) as other,
    ):
        np.testing.assert_array_equal(other.logits([1, 2], variant=variant), plain.logits([1, 2], variant=variant))


def test_an_entry_holds_packed_weights_for_other_runtimes(bundle4: Path, folder: Path) -> None:
    bundle, cache = Bundle.open(bundle4), PackedCache(folder)
    graph = bundle.manifest.variants["base"].graphs["cpu"]
    assert cache.find(bundle, graph) is None
    written = cache.write(bundle, graph)
    assert written is not None
    assert PackedCache(folder).find(bundle, graph) == written
    blobs = sum(bundle.manifest.files[name].size for name in graph.blobs)
    assert blobs < cache.measure() < 3 * blobs + 100_000
    cache.clear()
    assert cache.find(bundle, graph) is None
    assert not any(folder.iterdir())


def test_a_mapped_variant_takes_little_private_memory(bundle4: Path, folder: Path) -> None:
    blobs = Bundle.open(bundle4).manifest
    needed = sum(blobs.blob_bytes(blobs.variants["base"].graphs["cpu"]).values())
    with Runtime(bundle4, threads=1, kernels="onnxruntime", packed_cache=PackedCache(folder), memory_budget=needed) as runtime:
        for variant in ("base", "plain", "other"):  # writing each first takes as much memory as without a cache
            runtime.switch(variant)
        for variant in ("base", "plain", "other"):
            runtime.switch(variant)
        assert len(runtime.memory.graphs) == 3
        assert runtime.memory.private < needed
        assert not runtime.switch("base").cold


def test_another_onnxruntime_or_cpu_makes_its_own_entry(bundle4: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, cache = Bundle.open(bundle4), PackedCache(folder)
    graph = bundle.manifest.variants["base"].graphs["cpu"]
    assert cache.write(bundle, graph) is not None
    monkeypatch.setattr(ort, "__version__", "1.99.0")
    assert cache.find(bundle, graph) is None
    monkeypatch.undo()
    assert cache.find(bundle, graph) is not None
    monkeypatch.setattr(module, "_describe_cpu", lambda: "flags: none")
    assert cache.find(bundle, graph) is None


def test_damaged_entries_are_written_again(bundle4: Path, folder: Path, mapped: Runtime) -> None:
    tokens = random_tokens(5, seed=3)
    expected = mapped.logits(tokens)
    mapped.close()
    entry = entries(folder)[0]
    weights = entry / module.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    np.testing.assert_array_equal(mapped.logits(tokens), expected)
    mapped.close()
    (entry / module.ENTRY).write_text("no JSON", encoding="ascii")
    np.testing.assert_array_equal(mapped.logits(tokens), expected)
    assert json.loads((entry / module.ENTRY).read_text(encoding="ascii"))[module.WEIGHTS] == weights.stat().st_size


def test_an_entry_that_onnxruntime_cannot_open_does_no_harm(bundle4: Path, folder: Path, mapped: Runtime) -> None:
    tokens = random_tokens(5, seed=3)
    expected = mapped.logits(tokens)
    mapped.close()
    graph = entries(folder)[0] / module.GRAPH
    graph.write_bytes(b"\0" * graph.stat().st_size)
    np.testing.assert_array_equal(mapped.logits(tokens), expected)
    assert mapped.memory.private > mapped.memory.mapped, "the model holds its own packed copy"


def test_blobs_that_the_manifest_does_not_list_are_not_packed(bundle_copy: Path, folder: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    name = bundle.manifest.variants["base"].graphs["cpu"].blobs[0]
    damaged = bytearray((bundle_copy / name).read_bytes())
    damaged[0] ^= 1
    (bundle_copy / name).write_bytes(damaged)
    with (
        Runtime(bundle_copy, threads=1, kernels="onnxruntime", packed_cache=PackedCache(folder)) as runtime,
        pytest.raises(IntegrityError, match=name),
    ):
        runtime.logits([1])
    assert not any(folder.iterdir())


def test_the_least_recently_used_entry_goes_first(bundle4: Path, folder: Path) -> None:
    bundle = Bundle.open(bundle4)
    graphs = [bundle.manifest.variants[name].graphs["cpu"] for name in ("base", "plain", "other")]
    cache = PackedCache(folder)
    for graph in graphs[:2]:
        cache.write(bundle, graph)
    for age, graph in enumerate((graphs[1], graphs[0])):  # the first one is used last
        found = cache.find(bundle, graph)
        assert found is not None
        os.utime(found.parent / module.ENTRY, (1e9 + age, 1e9 + age))
    most = module._DISK_SHARE * sum(bundle.manifest.files[name].size for name in graphs[2].blobs)
    tight = PackedCache(folder, budget=cache.measure() // 2 + 1 + most)
    tight.write(bundle, graphs[2])
    assert [tight.find(bundle, graph) is not None for graph in graphs] == [True, False, True]


def test_an_entry_over_the_budget_evicts_nothing(bundle4: Path, folder: Path) -> None:
    bundle = Bundle.open(bundle4)
    graphs = [bundle.manifest.variants[name].graphs["cpu"] for name in ("base", "plain")]
    assert PackedCache(folder).write(bundle, graphs[0]) is not None
    tight = PackedCache(folder, budget="10KB")
    assert tight.write(bundle, graphs[1]) is None
    assert tight.write_inputs(bundle, (("plain", 1.0),), np.dtype(np.float32), {"a": np.zeros(10_000, np.float32)}) is None
    assert tight.find(bundle, graphs[0]) is not None


def test_an_entry_over_the_budget_is_not_written(bundle4: Path, folder: Path) -> None:
    with Runtime(bundle4, threads=1, kernels="onnxruntime", packed_cache=PackedCache(folder, budget="10KB")) as runtime:
        assert len(runtime.generate([1, 2], max_tokens=2, ignore_eos=True).tokens) == 2
    assert not any(folder.iterdir())


def test_concurrent_writers_make_one_entry(bundle4: Path, folder: Path) -> None:
    bundle = Bundle.open(bundle4)
    graph = bundle.manifest.variants["base"].graphs["cpu"]
    caches = [PackedCache(folder) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda cache: cache.write(bundle, graph), caches))
    assert len(found) == len(entries(folder)) == 1
    assert None not in found


@pytest.mark.parametrize("moment", ["_write_inputs", "_is_whole"])
def test_an_entry_that_another_writer_published_stays(
    bundle4: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    bundle, inputs = Bundle.open(bundle4), {"a": np.arange(8, dtype=np.float32)}

    def write() -> LoraInputs | None:
        return PackedCache(folder).write_inputs(bundle, (("plain", 1.0),), np.dtype(np.float32), inputs)

    def identify() -> list[int]:
        return [entry.stat().st_ino for entry in entries(folder)]

    undisturbed, published = getattr(module, moment), []

    def disturbed(*arguments: object) -> object:
        result = undisturbed(*arguments)
        monkeypatch.undo()
        write()
        published.extend(identify())
        return result

    monkeypatch.setattr(module, moment, disturbed)
    assert write() is not None
    assert identify() == published != []


def test_leftovers_of_a_killed_process_are_deleted(bundle4: Path, folder: Path) -> None:
    bundle, cache = Bundle.open(bundle4), PackedCache(folder)
    old, young = folder / ".unfinished-old", folder / ".unfinished-young"
    for left in (old, young):
        left.mkdir()
        (left / module.WEIGHTS).write_bytes(b"half")
    hours_ago = time.time() - 2 * module._ABANDONED
    os.utime(old, (hours_ago, hours_ago))
    cache.write(bundle, bundle.manifest.variants["base"].graphs["cpu"])
    assert not old.exists()
    assert young.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
def test_a_folder_that_others_can_write_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(UsageError, match="others can write"):
        PackedCache(folder)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="name another folder"):
        PackedCache(tmp_path / "file" / "packed")
