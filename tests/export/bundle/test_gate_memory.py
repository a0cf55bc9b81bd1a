"""The gate holds one variant's measurement at a time, with no more memory than a few batches of logits and one layer need."""

from __future__ import annotations

import gc
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from edgelora.adapters.folder import Adapter
from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.bundle.builder import BundleBuilder, build_bundle
from edgelora_export.bundle.fidelity import Teacher, compare, run_teacher
from edgelora_export.bundle.gate import Gate
from edgelora_export.bundle.plan import BundlePlan
from edgelora_export.plan.calibration import Calibration, Sample
from edgelora_export.plan.variants import Quantization, Variant
from edgelora_runtime.bundle.manifest import AdapterEntry
from edgelora_runtime.session.model import Model
from tests.tiny import make_adapter, make_base, random_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HELD_OUT = tuple(Sample(tuple(random_tokens(40, seed=seed))) for seed in range(3))


def make_plan(base: Path, folder: Path, count: int = 1) -> BundlePlan:
    """Plans the bare base and `count` variants of an adapter of its queries. The gate measures them and passes them all."""
    make_adapter(base, folder / "a", size=0.3, target_modules=["q_proj"])
    adapter, calibration = Adapter.open(folder / "a"), Calibration((), HELD_OUT)
    variants = [Variant(f"v{index}", {"a": 1.0}, delta=adapter, calibration=calibration) for index in range(count)]
    opened = Base.open(base)
    return BundlePlan(
        opened,
        read_decoder(opened.config),
        (Variant("base"), *variants),
        quantization=Quantization(method="rtn"),
        adapters={"a": AdapterEntry("0" * 64, adapter.rank)},
        live_adapters={"a": adapter},
        base_calibration=calibration,
        gate=Gate(retention=-100.0),
    )


def start_builder(plan: BundlePlan, folder: Path) -> BundleBuilder:
    """Makes a builder that has stored the plan's weights in a new folder."""
    folder.mkdir()
    builder = BundleBuilder(plan, folder)
    builder.write_texts()
    builder.store_weights()
    return builder


@contextmanager
def watch_peak() -> Iterator[list[int]]:
    """Yields a list. At the end of the block, the list gets the peak of the memory that Python and numpy took in the block, in
    bytes.
    """
    peaks: list[int] = []
    tracemalloc.start()
    try:
        yield peaks
    finally:
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()


def test_nothing_of_a_measured_variant_is_left_when_the_next_one_is_measured(tiny_base: Path, tmp_path: Path) -> None:
    held: dict[str, list[str]] = {}

    def watch(done: int, total: int, what: str) -> None:
        if what.startswith("checking"):
            held[what] = [type(item).__name__ for item in gc.get_objects() if type(item) in (Teacher, Model)]

    build_bundle(make_plan(tiny_base, tmp_path, count=2), tmp_path / "bundle", on_progress=watch)
    assert set(held) == {f"checking {name}, layer {layer} of 2" for name in ("base", "v0", "v1") for layer in (1, 2)}
    assert not any(held.values())


def test_a_comparison_holds_float32_logits_of_one_batch(tmp_path: Path) -> None:
    vocabulary, batch = 100_000, 32 << 20
    make_base(tmp_path / "base", vocab_size=vocabulary)
    builder = start_builder(make_plan(tmp_path / "base", tmp_path), tmp_path / "bundle")
    subject = builder.subject("v0")
    teacher = run_teacher(subject)
    with builder.run_variant("v0") as runtime:
        runtime.logits([5, 6, 7])  # opens the session, which reserves memory for the largest possible graph
        with watch_peak() as peaks:
            found = compare(
                subject, teacher, lambda tokens, count: runtime.iterate_logits(tokens, positions=count), batch_bytes=batch
            )
    # The variant's logits and a copy of them, doubled between two batches, two teachers, and a part of the head.
    assert batch < max(peaks) < 5.5 * batch
    assert found.tokens == sum(len(sample.tokens) - 1 for sample in HELD_OUT)


def test_a_teacher_holds_one_layer_and_what_the_adapter_changes_of_it(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_base(base, hidden_size=256, intermediate_size=2048, num_hidden_layers=3)
    subject = start_builder(make_plan(base, tmp_path), tmp_path / "bundle").subject("v0")
    with watch_peak() as peaks:
        run_teacher(subject)
    layer = np.float32().itemsize * 256 * (2 * 256 + 2 * 128 + 3 * 2048)
    assert layer < max(peaks) < 2 * layer
