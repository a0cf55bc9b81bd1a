"""The gate measures what transformers and PEFT measure, and repairs, rejects or makes live a variant that loses its adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from peft import PeftModel

from edgelora.adapters.folder import Adapter
from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_export.bundle.builder import BundleBuilder, build_bundle
from edgelora_export.bundle.fidelity import Subject, compare, run_teacher
from edgelora_export.bundle.gate import Gate
from edgelora_export.bundle.plan import BundlePlan
from edgelora_export.plan.calibration import Calibration, Sample
from edgelora_export.plan.variants import Delta, Quantization, TrainedBase, Variant
from edgelora_export.weights.stored import StoredWeights
from edgelora_runtime import Bundle, Runtime
from edgelora_runtime.bundle.manifest import AdapterEntry
from edgelora_runtime.errors import InputError, IntegrityError
from tests.tiny import build_variants, load_base, make_adapter, random_tokens, torch_logits

if TYPE_CHECKING:
    from collections.abc import Set
    from pathlib import Path

    from numpy.typing import NDArray

    from edgelora_runtime.bundle.manifest import Manifest

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

FIT = tuple(Sample(tuple(random_tokens(40, seed=seed))) for seed in range(30))
HELD_OUT = tuple(Sample(tuple(random_tokens(30 + seed, seed=100 + seed)), start=1 + seed) for seed in range(5))
CALIBRATION = Calibration(FIT, HELD_OUT, {"rows.jsonl": "0" * 64})


def make_plan(base: Path, adapter: Adapter, gate: Gate | None, *, kind: str = "merged", **settings: Any) -> BundlePlan:
    live = {"a": 1.0} if kind == "live" else None
    opened = Base.open(base)
    return BundlePlan(
        opened,
        read_decoder(opened.config),
        (Variant("base"), Variant("tuned", {"a": 1.0}, delta=adapter, live=live, calibration=CALIBRATION)),
        quantization=Quantization(**{"method": "rtn", **settings}),
        adapters={"a": AdapterEntry("0" * 64, adapter.rank)},
        live_adapters={"a": adapter},
        base_calibration=CALIBRATION,
        gate=gate,
    )


def build(base: Path, adapter: Adapter, output: Path, gate: Gate | None, **settings: Any) -> Manifest:
    return build_bundle(make_plan(base, adapter, gate, **settings), output)


@pytest.fixture(scope="module")
def strong(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """An adapter that changes the model's logits far more than rounding does."""
    folder = tmp_path_factory.mktemp("strong")
    make_adapter(tiny_base, folder, size=0.3)
    return Adapter.open(folder)


@pytest.fixture(scope="module")
def faint(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """An adapter that is so small that rounding to nearest changes the weights more than it does."""
    folder = tmp_path_factory.mktemp("faint")
    make_adapter(tiny_base, folder, size=0.012)
    return Adapter.open(folder)


def softmax(logits: Floats) -> Doubles:
    wide: Doubles = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    wide /= wide.sum(axis=-1, keepdims=True)
    return wide


@pytest.mark.parametrize(("kind", "positions"), [("merged", 1000), ("merged", 7), ("live", 20)])
def test_figures_are_those_of_peft_against_the_runtime(
    tiny_base: Path, strong: Adapter, tmp_path: Path, kind: str, positions: int
) -> None:
    """The figures do not depend on the number of positions that are compared at once."""
    builder = BundleBuilder(make_plan(tiny_base, strong, None, kind=kind), tmp_path)
    builder.write_texts()
    builder.store_weights()
    subject = builder.subject("tuned")
    adapted = PeftModel.from_pretrained(load_base(tiny_base), strong.folder).eval()
    bare = load_base(tiny_base)
    divergences, moved, same, nats = [], [], [], []
    with builder.run_variant("tuned") as runtime:
        found = compare(
            subject,
            run_teacher(subject),
            lambda tokens, count: runtime.iterate_logits(tokens, positions=count),
            batch_bytes=positions * 4 * 300,  # of the tiny base's 300 tokens
        )
        for sample in HELD_OUT:
            rows = slice(sample.start - 1, len(sample.tokens) - 1)
            said = softmax(runtime.logits(sample.tokens)[rows])
            wanted = softmax(torch_logits(adapted, sample.tokens)[rows])
            without = softmax(torch_logits(bare, sample.tokens)[rows])
            divergences.append((wanted * np.log(wanted / said)).sum(axis=1))
            moved.append((wanted * np.log(wanted / without)).sum(axis=1))
            same.append(wanted.argmax(axis=1) == said.argmax(axis=1))
            nats.append(-np.log(said[np.arange(len(said)), sample.tokens[sample.start :]]))
    divergence = np.concatenate(divergences)
    assert found.tokens == len(divergence)
    assert found.kl_mean == pytest.approx(divergence.mean(), rel=1e-2)
    assert found.kl_p99 == pytest.approx(np.quantile(divergence, 0.99), rel=1e-2)
    assert found.adapter_kl == pytest.approx(np.concatenate(moved).mean(), rel=1e-3)
    assert found.retention == pytest.approx(1 - found.kl_mean / found.adapter_kl)
    assert found.top1 == pytest.approx(np.concatenate(same).mean(), abs=0.011)
    assert found.perplexity == pytest.approx(np.exp(np.concatenate(nats).mean()), rel=1e-3)


@pytest.fixture(scope="module")
def answered(tiny_base: Path, strong: Adapter) -> tuple[Sample, ...]:
    """Samples that the adapter writes itself, by PEFT, from prompts of different lengths, and one that it does not."""
    adapted = PeftModel.from_pretrained(load_base(tiny_base), strong.folder).eval()
    samples = []
    for seed in range(14):
        tokens = random_tokens(6 + seed, seed=200 + seed)
        start = len(tokens)
        for _ in range(1 + seed % 3):
            tokens.append(int(torch_logits(adapted, tokens)[-1].argmax()))
        samples.append(Sample(tuple(tokens), start))
    other = samples[0]
    return (Sample((*other.tokens[:-1], (other.tokens[-1] + 1) % 300), other.start), *samples)


@pytest.mark.parametrize("positions", [1000, 5])
def test_answers_are_those_that_peft_writes_and_the_runtime_too(
    tiny_base: Path, strong: Adapter, answered: tuple[Sample, ...], tmp_path: Path, positions: int
) -> None:
    plan = make_plan(tiny_base, strong, None)
    variants = (plan.variants[0], replace(plan.variants[1], calibration=Calibration(FIT, answered)))
    builder = BundleBuilder(replace(plan, variants=variants), tmp_path)
    builder.write_texts()
    builder.store_weights()
    subject = builder.subject("tuned")
    with builder.run_variant("tuned") as runtime:
        found = compare(
            subject,
            run_teacher(subject),
            lambda tokens, count: runtime.iterate_logits(tokens, positions=count),
            batch_bytes=positions * 4 * 300,
        )
        kept = [
            runtime.generate(sample.tokens[: sample.start], max_tokens=len(sample.tokens) - sample.start, ignore_eos=True).tokens
            == sample.tokens[sample.start :]
            for sample in answered[1:]
        ]
    assert (found.answers, found.answers_kept) == (14, sum(kept))
    assert found.answers_share == sum(kept) / 14 and 0 < sum(kept) < 14


def test_answers_are_a_limit_where_there_are_enough(
    tiny_base: Path, strong: Adapter, answered: tuple[Sample, ...], tmp_path: Path
) -> None:
    plan = make_plan(tiny_base, strong, Gate(policy="fail", retention=-100.0, answers=1.0))
    for count, refused in ((15, True), (10, False)):  # of which one is not the adapter's own
        variants = (plan.variants[0], replace(plan.variants[1], calibration=Calibration(FIT, answered[:count])))
        if refused:
            with pytest.raises(IntegrityError, match=r"tuned writes \d+ of the 14 held-out answers that its adapter writes"):
                build_bundle(replace(plan, variants=variants), tmp_path / "refused")
        else:
            fidelity = build_bundle(replace(plan, variants=variants), tmp_path / "kept").variants["tuned"].fidelity
            assert fidelity is not None and fidelity.answers == 9 > fidelity.answers_kept


@pytest.mark.parametrize("kind", ["merged", "live"])
def test_the_manifest_has_the_figures_and_whose_kernels_they_were_measured_with(
    tiny_base: Path, strong: Adapter, tmp_path: Path, kind: str
) -> None:
    plan = make_plan(tiny_base, strong, Gate(retention=-100.0), kind=kind)
    manifest = build_bundle(plan, tmp_path / "bundle")
    entry, base = manifest.variants["tuned"].fidelity, manifest.variants["base"].fidelity
    assert entry is not None and base is not None and base.retention is None
    subject = Subject(plan.base, plan.decoder, plan.variants[1], HELD_OUT, tmp_path / "bundle", StoredWeights(), None)
    with Runtime(tmp_path / "bundle") as runtime:
        assert entry.kernels == runtime.kernels
        teacher = run_teacher(replace(subject, variant=replace(subject.variant, live={"a": 1.0})))  # compares no products
        found = compare(subject, teacher, lambda tokens, count: runtime.iterate_logits(tokens, variant="tuned", positions=count))
    assert (entry.tokens, entry.top1) == (found.tokens, found.top1)
    assert entry.kl_mean == pytest.approx(found.kl_mean)
    assert entry.retention == pytest.approx(found.retention)


def test_product_figures_are_the_formulas(tiny_base: Path, strong: Adapter, tmp_path: Path) -> None:
    manifest = build(tiny_base, strong, tmp_path / "bundle", Gate(retention=-100.0))
    found = manifest.variants["tuned"].fidelity
    assert found is not None
    assert len(found.products) == 8
    for product in found.products.values():
        assert product.bits == 4
        assert product.delta_projection == pytest.approx(1, abs=0.2)
        assert 0.1 < product.codes_changed < 1
        assert 0 < product.noise < 1


def test_a_strong_adapter_passes(tiny_base: Path, strong: Adapter, tmp_path: Path) -> None:
    manifest = build(tiny_base, strong, tmp_path / "bundle", Gate(policy="fail", retention=0.5))
    tuned = manifest.variants["tuned"]
    assert tuned.fidelity is not None and tuned.fidelity.outcome == "passed"
    assert tuned.int8 == ()


def test_a_lost_adapter_fails_and_the_layers_are_named(tiny_base: Path, faint: Adapter, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError) as caught:
        build(tiny_base, faint, tmp_path / "bundle", Gate(policy="fail"))
    assert caught.value.exit_code == 4
    assert "tuned keeps" in str(caught.value) and "layers." in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_a_lost_adapter_is_repaired(tiny_base: Path, faint: Adapter, tmp_path: Path) -> None:
    measured = build(tiny_base, faint, tmp_path / "as-is", Gate(retention=-100.0)).variants["tuned"].fidelity
    assert measured is not None and measured.retention is not None and measured.retention < 0.8
    manifest = build(tiny_base, faint, tmp_path / "bundle", Gate(policy="repair"))
    tuned, base = manifest.variants["tuned"], manifest.variants["base"]
    assert tuned.fidelity is not None and tuned.fidelity.outcome == "repaired"
    assert tuned.fidelity.retention is not None and tuned.fidelity.retention >= 0.8
    assert tuned.int8 and all(tuned.fidelity.products[name].bits == 8 for name in tuned.int8 if name in tuned.fidelity.products)
    assert base.int8 == ()
    assert Bundle.open(tmp_path / "bundle").verify(lambda name: None) == []
    used = {blob for variant in manifest.variants.values() for graph in variant.graphs.values() for blob in graph.blobs}
    assert used == {name for name in manifest.files if name.endswith(".bin")}


@dataclass(frozen=True)
class Scaled(Delta):
    """An adapter's change times a factor, as a stand-in for a merge that misses the adapter's effect."""

    adapter: Adapter
    factor: float

    @property
    def modules(self) -> Set[str]:
        return self.adapter.modules

    def dense(self, module: str, weight: Floats) -> Floats:
        return np.float32(self.factor) * self.adapter.dense(module, weight)


@pytest.mark.parametrize("chosen", [True, False])
def test_a_trained_base_that_loses_the_adapter_is_given_up_if_it_was_edgeloras_choice(
    tiny_base: Path, strong: Adapter, tmp_path: Path, chosen: bool
) -> None:
    trained = TrainedBase("nf4", merged=Scaled(strong, 0.1), unmerged=strong)
    losses = {"float": 3.0, "trained": 2.0} if chosen else {}
    manifest = build_variants(
        Base.open(tiny_base),
        [
            Variant(
                "tuned", {"a": 1.0}, delta=strong, calibration=CALIBRATION, trained=trained, merge_base="trained",
                merge_losses=losses,
            )
        ],
        tmp_path / "bundle",
        quantization=Quantization(method="rtn"),
        adapters={"a": AdapterEntry("0" * 64, strong.rank)},
        live_adapters={"a": strong},
        base_calibration=CALIBRATION,
        gate=Gate(retention=0.5),
    )  # fmt: skip
    tuned = manifest.variants["tuned"]
    assert tuned.fidelity is not None and tuned.fidelity.retention is not None and tuned.fidelity.retention >= 0.5
    assert tuned.merge_base == "float" and tuned.int8 == ()
    assert (tuned.kind, tuned.fidelity.outcome) == (("merged", "repaired") if chosen else ("live", "live"))
    assert tuned.merge_losses == losses


def test_live_policy_turns_a_lost_adapter_live(tiny_base: Path, faint: Adapter, tmp_path: Path) -> None:
    manifest = build(tiny_base, faint, tmp_path / "bundle", Gate(policy="live"))
    tuned = manifest.variants["tuned"]
    assert tuned.kind == "live" and tuned.live == {"a": 1.0}
    assert tuned.fidelity is not None and tuned.fidelity.outcome == "live"
    with Runtime(tmp_path / "bundle") as runtime:
        assert runtime.generate([5, 6, 7], variant="tuned", max_tokens=4).tokens


def test_weights_by_module_do_not_go_live(tiny_base: Path, faint: Adapter, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"cannot be made live: a weighs by module.*edgelora compose"):
        build_variants(
            Base.open(tiny_base),
            [Variant("tuned", {"a": 1.0}, delta=faint, calibration=CALIBRATION, weights={"a": {"*": 1.0}})],
            tmp_path / "bundle",
            quantization=Quantization(method="rtn"),
            adapters={"a": AdapterEntry("0" * 64, faint.rank)},
            live_adapters={"a": faint},
            base_calibration=CALIBRATION,
            gate=Gate(policy="live"),
        )


def test_what_nothing_mends_ends_live(tiny_base: Path, faint: Adapter, tmp_path: Path) -> None:
    manifest = build(tiny_base, faint, tmp_path / "bundle", Gate(policy="repair", retention=1.0))
    assert manifest.variants["tuned"].kind == "live"


def test_a_variant_may_go_live_where_none_ran_the_bare_base(tiny_base: Path, tmp_path: Path) -> None:
    """Weights of the base that no graph uses are kept as long as a variant may need them."""
    make_adapter(tiny_base, tmp_path / "a", size=0.012, target_modules=["q_proj"])
    adapter = Adapter.open(tmp_path / "a")
    manifest = build_variants(
        Base.open(tiny_base),
        [Variant("tuned", {"a": 1.0}, delta=adapter, calibration=CALIBRATION)],
        tmp_path / "bundle",
        quantization=Quantization(method="rtn"),
        adapters={"a": AdapterEntry("0" * 64, adapter.rank)},
        live_adapters={"a": adapter},
        base_calibration=CALIBRATION,
        gate=Gate(policy="live", retention=1.0),
    )
    assert manifest.variants["tuned"].kind == "live"
    with Runtime(tmp_path / "bundle") as runtime:
        assert runtime.generate([5, 6, 7], max_tokens=4).tokens


def test_max_kl_and_min_top1_are_limits_too(tiny_base: Path, strong: Adapter, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError) as caught:
        build(tiny_base, strong, tmp_path / "bundle", Gate(policy="fail", retention=-100.0, max_kl=1e-9, min_top1=1.0))
    assert "nats per token" in str(caught.value) and "of the tokens" in str(caught.value)


def test_gptq_strays_less_than_rounding(tiny_base: Path, strong: Adapter, tmp_path: Path) -> None:
    strayed = {}
    for method in ("rtn", "gptq"):
        found = build(tiny_base, strong, tmp_path / method, Gate(retention=-100.0), method=method).variants["tuned"].fidelity
        assert found is not None
        strayed[method] = found.kl_mean
    assert strayed["gptq"] < 0.95 * strayed["rtn"]


def test_patterns_give_products_8_bits(tiny_base: Path, strong: Adapter, tmp_path: Path) -> None:
    manifest = build(tiny_base, strong, tmp_path / "bundle", Gate(), int8=("*.mlp.down", "head"))
    assert set(manifest.variants["base"].int8) == {"layers.0.mlp.down", "layers.1.mlp.down", "head"}
    with pytest.raises(InputError, match="mpl"):
        build(tiny_base, strong, tmp_path / "wrong", Gate(), int8=("*.mpl.down",))


@pytest.mark.parametrize(
    ("settings", "mention"),
    [
        ({"policy": "maybe"}, "maybe"),
        ({"retention": 1.5}, "1.5"),
        ({"answers": 2.0}, "answers"),
        ({"max_kl": 0.0}, "max_kl"),
        ({"min_top1": 2.0}, "min_top1"),
    ],
)
def test_gates_that_make_no_sense(settings: dict[str, Any], mention: str) -> None:
    with pytest.raises(InputError, match=mention):
        Gate(**settings)
