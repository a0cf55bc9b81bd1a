"""What the gate holds at once is one variant's judgement, and of that no more than a few batches of logits and one layer."""

from __future__ import annotations

import tracemalloc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.adapters.folder import Adapter
from edgelora_export.bundle import fidelity, gate
from edgelora_export.bundle.builder import build_bundle
from edgelora_export.bundle.gate import Gate
from edgelora_export.plan.calibration import Calibration, Sample
from edgelora_export.plan.variants import Quantization, Variant
from edgelora_export.weights.base import Base
from edgelora_runtime.bundle.manifest import AdapterEntry
from edgelora_runtime.session.model import Model
from tests.tiny import make_adapter, make_base, random_tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from edgelora_runtime.bundle.manifest import Manifest

HELD_OUT = tuple(Sample(tuple(random_tokens(40, seed=seed))) for seed in range(3))


def judge_variants(base: Path, folder: Path, count: int = 1) -> Manifest:
    """Exports the bare base and so many variants of an adapter of its queries, measured and passed whatever they keep."""
    make_adapter(base, folder / "a", size=0.3, target_modules=["q_proj"])
    adapter, calibration = Adapter.open(folder / "a"), Calibration((), HELD_OUT)
    variants = [Variant(f"v{index}", {"a": 1.0}, delta=adapter, calibration=calibration) for index in range(count)]
    return build_bundle(
        Base.open(base),
        [Variant("base"), *variants],
        folder / "bundle",
        quantization=Quantization(method="rtn"),
        adapters={"a": AdapterEntry("0" * 64, adapter.rank)},
        live_adapters={"a": adapter},
        base_calibration=calibration,
        gate=Gate(retention=-100.0),
    )


def watch_peak(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """The most bytes that Python and numpy took during each call of a function of the gate, over what they had before."""
    function: Callable[..., Any] = getattr(gate, name)
    peaks: list[int] = []

    def traced(*arguments: Any) -> Any:
        tracemalloc.start()
        try:
            return function(*arguments)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(gate, name, traced)
    return peaks


def test_nothing_of_a_judged_variant_is_left_when_the_next_one_is_judged(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []
    steps: list[str] = []

    def watched_teacher(*arguments: Any) -> Any:
        assert [reference() for reference in held] == [None] * len(held)
        teacher = fidelity.run_teacher(*arguments)
        held.append(weakref.ref(teacher))
        steps.append("teacher")
        return teacher

    def watched_model(*arguments: Any, **settings: Any) -> Any:
        model = Model(*arguments, **settings)
        held.append(weakref.ref(model))
        steps.append("session")
        return model

    monkeypatch.setattr(gate, "run_teacher", watched_teacher)
    monkeypatch.setattr("edgelora_runtime.residency.loader.Model", watched_model)
    monkeypatch.setattr(gate, "return_freed_memory", lambda: steps.append("returned"))
    judge_variants(tiny_base, tmp_path, count=2)
    assert steps == ["teacher", "returned", "session"] * 3


def test_a_comparison_holds_float32_logits_of_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, batch = 100_000, 8 << 20
    make_base(tmp_path / "base", vocab_size=vocabulary)
    monkeypatch.setattr(fidelity, "_LOGITS_BYTES", batch)
    monkeypatch.setattr(fidelity, "_WIDE", vocabulary)

    def loaded(*arguments: Any, **settings: Any) -> Any:
        model = Model(*arguments, **settings)
        tracemalloc.reset_peak()  # reading the graph reserves room for the largest that it might be
        return model

    monkeypatch.setattr("edgelora_runtime.residency.loader.Model", loaded)
    peaks = watch_peak(monkeypatch, "compare")
    manifest = judge_variants(tmp_path / "base", tmp_path)
    # What the variant says and a copy of it, which a change of batch doubles, two teachers, and a part of the head.
    assert max(peaks) < 5.5 * batch
    found = manifest.variants["v0"].fidelity
    assert found is not None and found.tokens == sum(len(sample.tokens) - 1 for sample in HELD_OUT)


def test_a_teacher_holds_one_layer_and_what_the_adapter_changes_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    make_base(base, hidden_size=256, intermediate_size=2048, num_hidden_layers=3)
    peaks = watch_peak(monkeypatch, "run_teacher")
    judge_variants(base, tmp_path)
    layer = np.float32().itemsize * 256 * (2 * 256 + 2 * 128 + 3 * 2048)
    assert max(peaks) < 2 * layer
