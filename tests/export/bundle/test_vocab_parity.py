"""Variants with an embedding, a head or a vocabulary of their own compute what PEFT computes with the unmerged adapter.

PEFT's merge_and_unload is no reference here: it adds a change of one of two tied matrices to both.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from transformers import Gemma3TextConfig, GraniteConfig

from edgelora_export.base.base import Base
from edgelora_export.bundle.gate import Gate
from edgelora_export.graph import stages
from edgelora_export.plan.calibration import Calibration, Sample
from edgelora_export.plan.variants import Quantization, Variant
from edgelora_runtime import Bundle, Runtime
from edgelora_runtime.errors import InputError, IntegrityError
from tests.own_kernels import needs_kernels
from tests.tiny import build_variants, load_base, make_base, random_tokens, torch_logits
from tests.trained_changes import Trained, TrainedChange, greedy_text, mean_kl, train_somewhat

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from edgelora_runtime.bundle.manifest import Manifest

ROWS = 306  # of the base's 300, with six tokens more
# By name: settings of train_somewhat, and what of the base's tied matrix the variant has for itself.
TIED: Mapping[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "lora-embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, ("embedding",)),
    "lora-head": ({"target_modules": ["q_proj", "lm_head"]}, ("head",)),
    "lora-both": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, ("embedding", "head")),
    "lora-together": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, ("embedding", "head")),
    "saved-embedding": ({"modules_to_save": ["embed_tokens"]}, ("embedding",)),
    "saved-head": ({"modules_to_save": ["lm_head"]}, ("head",)),
    "saved-together": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, ("embedding", "head")),
    "tokens": ({"trainable_token_indices": [5, 7]}, ("embedding", "head")),
    "more": ({"rows": ROWS, "trainable_token_indices": list(range(300, ROWS))}, ("embedding", "head")),
    "more-apart": ({"rows": ROWS, "modules_to_save": ["embed_tokens", "lm_head"]}, ("embedding", "head")),
    "fewer": ({"rows": 290, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, ("embedding", "head")),
}
UNTIED: Mapping[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "tokens": ({"trainable_token_indices": [5, 7]}, ("embedding",)),
    "saved-head": ({"modules_to_save": ["lm_head"]}, ("head",)),
    "more": ({"rows": ROWS, "modules_to_save": ["embed_tokens", "lm_head"]}, ("embedding", "head")),
    "fewer": ({"rows": 290}, ("embedding", "head")),
}
TOKENS = random_tokens(30, 290, seed=5)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


class Family:
    """A base, adapters of it, and bundles of one variant per adapter, each built when first asked for."""

    def __init__(self, folder: Path, kinds: Mapping[str, tuple[dict[str, Any], tuple[str, ...]]], **shape: Any) -> None:
        self.folder, self.kinds = folder, kinds
        make_base(folder / "base", **shape)
        self.trained: dict[str, Trained] = {
            name: train_somewhat(folder / "base", folder / name, **settings) for name, (settings, _) in kinds.items()
        }

    def build(self, name: str, *, names: tuple[str, ...] = (), **settings: Any) -> Manifest:
        """Builds a bundle, unless it exists. names: of the adapters, () for all."""
        output = self.folder / f"bundle-{name}"
        if output.exists():
            return Bundle.open(output).manifest
        calibration = settings.pop("calibration", Calibration())
        variants = [
            Variant(each, {each: 1.0}, delta=self.trained[each].change, calibration=calibration) for each in names or self.kinds
        ]
        base = Base.open(self.folder / "base")
        return build_variants(base, [Variant("base"), *variants], output, **settings)

    def open(self, name: str, **settings: Any) -> Runtime:
        return Runtime(self.folder / f"bundle-{name}", **settings)


@pytest.fixture(scope="module", params=["tied", "untied"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    tied = request.param == "tied"
    return Family(tmp_path_factory.mktemp(request.param), TIED if tied else UNTIED, tie_word_embeddings=tied)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Family:
    kinds = {name: TIED[name] for name in ("lora-embedding", "lora-head", "more", "fewer")}
    return Family(tmp_path_factory.mktemp("few"), kinds, tie_word_embeddings=True)


@pytest.fixture
def resized(tied: Family) -> Iterator[Runtime]:
    """A float32 bundle with the base, and variants of more and of fewer tokens."""
    tied.build("float", quantization=Quantization(bits=32))
    with tied.open("float") as runtime:
        yield runtime


def test_float32_is_pefts_unmerged_forward(family: Family) -> None:
    manifest = family.build("float", quantization=Quantization(bits=32))
    with family.open("float") as runtime:
        bare = runtime.logits(TOKENS, variant="base")
        assert_close(bare, torch_logits(load_base(family.folder / "base"), TOKENS))
        for name, (settings, own) in family.kinds.items():
            wanted = torch_logits(family.trained[name].model, TOKENS)
            assert_close(runtime.logits(TOKENS, variant=name), wanted, name)
            entry = manifest.variants[name]
            assert (entry.own_vocab, entry.vocab_size) == (own, settings.get("rows")), name
            assert np.abs(wanted[:, :290] - bare[:, :290]).max() > 0.1, f"{name} should matter"


@pytest.mark.parametrize(("method", "bits"), [("rtn", 4), ("gptq", 4), ("gptq", 8)])
def test_rounding_costs_what_it_costs_the_bare_base(tied: Family, method: str, bits: int) -> None:
    calibration = Calibration(fit=tuple(Sample(tuple(random_tokens(48, 290, seed=seed))) for seed in range(40, 48)))
    grid = Quantization(bits=bits, method=method)
    tied.build(f"{method}{bits}", calibration=calibration, base_calibration=calibration, quantization=grid)
    with tied.open(f"{method}{bits}") as runtime:
        bare = torch_logits(load_base(tied.folder / "base"), TOKENS)
        usual = mean_kl(bare, runtime.logits(TOKENS, variant="base"))
        for name in tied.kinds:
            wanted = torch_logits(tied.trained[name].model, TOKENS)
            assert mean_kl(wanted, runtime.logits(TOKENS, variant=name)) < 2 * usual, name


def test_other_variants_share_what_a_variant_leaves_alone(tied: Family) -> None:
    manifest = tied.build("int4", quantization=Quantization(method="rtn"))
    blobs = {name: set(entry.graphs["cpu"].blobs) for name, entry in manifest.variants.items()}
    matrix = 300 * 64 // 2 + 300 * 2 * 4  # bytes of int4 codes and scales
    shared = [blob for blob in blobs["base"] if abs(manifest.files[blob].size - matrix) < 128]
    assert len(shared) == 1
    assert shared[0] in blobs["lora-embedding"] & blobs["lora-head"]
    assert shared[0] not in blobs["more"] | blobs["fewer"]
    own = blobs["lora-head"] - blobs["base"]
    assert sum(manifest.files[blob].size for blob in own if abs(manifest.files[blob].size - matrix) < 128) < matrix + 128


@needs_kernels
def test_own_kernels(tied: Family) -> None:
    tied.build("int4", quantization=Quantization(method="rtn"))
    with tied.open("int4", kernels="edgelora") as ours, tied.open("int4", kernels="onnxruntime") as theirs:
        assert ours.kernels != theirs.kernels
        for name in tied.kinds:
            found, wanted = (runtime.logits(TOKENS, variant=name) for runtime in (ours, theirs))
            assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max(), name


def test_gpu_graphs(tied: Family) -> None:
    manifest = tied.build("gpu", quantization=Quantization(bits=32), targets=("cpu", "gpu"))
    assert all("gpu" in entry.graphs for entry in manifest.variants.values())
    with tied.open("gpu", target="gpu", provider="cpu") as half, tied.open("gpu", target="cpu", provider="cpu") as full:
        for name in tied.kinds:
            found, wanted = (runtime.logits(TOKENS, variant=name) for runtime in (half, full))
            assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max(), name


def test_stages_compute_the_same(tied: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "LEAST_BYTES", 0)
    monkeypatch.setattr(stages, "LEAST_SHARED", 0.0)
    manifest = tied.build("stages", quantization=Quantization(bits=32))
    assert len(manifest.variants["lora-head"].graphs["cpu"].stages) > 1
    with tied.open("stages", kernels="onnxruntime") as runtime:
        for name in tied.kinds:
            assert_close(runtime.logits(TOKENS, variant=name), torch_logits(tied.trained[name].model, TOKENS), name)


@pytest.mark.parametrize("name", ["lora-embedding", "more"])
def test_the_teacher_is_peft(tied: Family, name: str) -> None:
    """The gate's figures come from the unmerged adapter on the float base, as torch computes it."""
    held_out = tuple(Sample(tuple(random_tokens(40, 290, seed=seed))) for seed in (60, 61))
    manifest = tied.build(
        f"gate-{name}",
        names=(name,),
        calibration=Calibration(held_out=held_out),
        quantization=Quantization(bits=8, method="rtn"),
        gate=Gate(retention=0.5),
    )
    found = manifest.variants[name].fidelity
    assert found is not None
    model, bare = tied.trained[name].model, load_base(tied.folder / "base")
    nats, effect = [], []
    for sample in held_out:
        tokens = list(sample.tokens)
        wanted = torch_logits(model, tokens)[:-1]
        before = torch_logits(bare, tokens)[:-1]
        before = np.pad(before, ((0, 0), (0, wanted.shape[1] - before.shape[1])))  # rows of zeros give logits of zero
        nats += [mean_nats(wanted, tokens[1:])]
        effect += [mean_kl(wanted, before)]
    assert found.teacher_perplexity == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
    assert found.adapter_kl == pytest.approx(np.mean(effect), rel=1e-4)
    assert found.retention is not None
    assert found.retention > 0.9


def test_a_variant_that_no_precision_saves_is_refused_with_the_reason(tied: Family, tmp_path: Path) -> None:
    """All its matrices are raised to 8 bits, the base's among them, before the gate gives up."""
    held_out = Calibration(held_out=(Sample(tuple(TOKENS)),))
    trained = tied.trained["lora-head"]
    variant = Variant("v", {"a": 1.0}, delta=trained.change, calibration=held_out)
    with pytest.raises(IntegrityError, match=r"v keeps .* and cannot be made live: it changes the embedding or the head"):
        build_variants(Base.open(tied.folder / "base"), [variant], tmp_path / "out", gate=Gate(retention=1.0))
    assert not (tmp_path / "out").exists()
    manifest = build_variants(Base.open(tied.folder / "base"), [variant], tmp_path / "out", gate=Gate(retention=0.97))
    entry = manifest.variants["v"]
    assert entry.fidelity is not None
    assert entry.fidelity.outcome == "repaired"
    assert {"embedding", "head"} <= set(entry.int8)
    with Runtime(tmp_path / "out") as runtime:
        assert mean_kl(torch_logits(trained.model, TOKENS), runtime.logits(TOKENS)) < 0.01


def test_an_interrupted_export_goes_on_with_its_own_head(tied: Family, tmp_path: Path) -> None:
    """The head that is finished is not quantized again, and the bundle is the one of an export that was not interrupted."""
    fit = Calibration(fit=tuple(Sample(tuple(random_tokens(24, seed=seed))) for seed in range(3)))
    base, stored = Base.open(tied.folder / "base"), []

    def export(output: Path, until: str | None = None) -> dict[str, bytes]:
        def count(done: int, total: int, what: str) -> None:
            stored.append(what)
            if until is not None and what.startswith(until):
                raise KeyboardInterrupt

        variants = [Variant("base"), Variant("v", {"a": 1.0}, delta=tied.trained["lora-head"].change, calibration=fit)]
        build_variants(base, variants, output, base_calibration=fit, resume_key="the plan", on_progress=count)
        return {path.name: path.read_bytes() for path in output.iterdir()}

    whole = export(tmp_path / "whole")
    assert sum(what.startswith("v, head") for what in stored) == 2
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "bundle", until="v, layer 2")
    stored.clear()
    assert export(tmp_path / "bundle") == whole
    assert not any(what.startswith("v, head") for what in stored)


@pytest.mark.parametrize("settings", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"rows": 306, "lora_bias": True}])
@pytest.mark.parametrize("kind", ["gemma3", "granite"])
def test_scaled_embeddings_and_capped_logits(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    shapes: dict[str, dict[str, Any]] = {
        "gemma3": {"config_class": Gemma3TextConfig, "head_dim": 16, "sliding_window": 8},
        "granite": {"config_class": GraniteConfig, "embedding_multiplier": 12.0, "logits_scaling": 8.0},
    }
    make_base(tmp_path / "base", **(shapes[kind] | {"tie_word_embeddings": True}))
    trained = train_somewhat(tmp_path / "base", tmp_path / "adapter", **settings)
    variants = [Variant("v", {"a": 1.0}, delta=trained.change), Variant("base")]
    build_variants(Base.open(tmp_path / "base"), variants, tmp_path / "out", quantization=Quantization(bits=32))
    with Runtime(tmp_path / "out") as runtime:
        assert_close(runtime.logits(TOKENS, variant="v"), torch_logits(trained.model, TOKENS))
        assert_close(runtime.logits(TOKENS, variant="base"), torch_logits(load_base(tmp_path / "base"), TOKENS))


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("tie", [True, False])
def test_a_size_alone_cuts_the_bases_rows_or_adds_zeros(tie: bool, bits: int, tmp_path: Path) -> None:
    make_base(tmp_path / "base", tie_word_embeddings=tie)
    variants = [Variant("base"), *(Variant(str(rows), delta=TrainedChange({}, rows=rows)) for rows in (290, ROWS))]
    grid = Quantization(bits=bits, method="rtn")
    build_variants(Base.open(tmp_path / "base"), variants, tmp_path / "out", quantization=grid)
    with Runtime(tmp_path / "out") as runtime:
        wanted = runtime.logits(TOKENS, variant="base")
        np.testing.assert_allclose(runtime.logits(TOKENS, variant="290"), wanted[:, :290], atol=1e-5)
        more = runtime.logits([*TOKENS, ROWS - 1], variant=str(ROWS))
        np.testing.assert_allclose(more[:-1, :300], wanted, atol=1e-5)
        assert (more[:, 300:] == 0).all()


def test_generation_is_pefts(resized: Runtime, tied: Family) -> None:
    for name in ("more", "fewer", "lora-head"):
        written = resized.generate(TOKENS, variant=name, max_tokens=12, ignore_eos=True, logprobs=3)
        assert list(written.tokens) == greedy_text(tied.trained[name].model, TOKENS, 12)


def test_each_variant_checks_tokens_against_its_own_vocabulary(resized: Runtime, tied: Family) -> None:
    assert resized.logits([ROWS - 1], variant="more").shape == (1, ROWS)
    assert_close(resized.logits([ROWS - 1, 5], variant="more"), torch_logits(tied.trained["more"].model, [ROWS - 1, 5]))
    for variant, size in (("base", 300), ("fewer", 290), ("more", ROWS)):
        with pytest.raises(InputError, match=f"token {size} is outside the vocabulary of {size}"):
            resized.logits([size], variant=variant)
        with pytest.raises(InputError, match=f"outside the vocabulary of {size}"):
            resized.generate([size], variant=variant)
        with pytest.raises(InputError, match=f"outside the vocabulary of {size}"):
            resized.embed([size], variant=variant)
        assert resized.embed([size - 1], variant=variant).shape == (64,)


def test_a_grammar_masks_the_variants_own_logits(resized: Runtime) -> None:
    for variant in ("more", "base", "fewer", "more"):
        assert resized.generate("the cat", variant=variant, regex="[ab]{5}", max_tokens=9).text.strip("ab") == ""


def test_saved_prompts_hold_the_variants_own_tokens(resized: Runtime, tied: Family, tmp_path: Path) -> None:
    prompt = [*TOKENS, ROWS - 1]
    resized.generate(prompt, variant="more", max_tokens=2, ignore_eos=True)
    resized.generate(TOKENS, variant="fewer", max_tokens=2, ignore_eos=True)
    assert resized.save_prompts(tmp_path / "prompts") == 2
    with tied.open("float") as again:
        assert again.load_prompts(tmp_path / "prompts") == 2
        assert again.generate(prompt, variant="more", max_tokens=2, ignore_eos=True).reused_tokens == len(prompt) - 1


def test_genai_config_has_the_default_variants_vocabulary(tied: Family) -> None:
    tied.build("default", names=("more",), quantization=Quantization(bits=32), default="more")
    config = json.loads((tied.folder / "bundle-default" / "genai_config.json").read_text(encoding="utf-8"))
    assert config["model"]["vocab_size"] == ROWS


def test_int8_of_the_embedding_is_that_of_an_untied_head(tied: Family) -> None:
    names = ("lora-embedding", "lora-head")
    manifest = tied.build("int8", names=names, quantization=Quantization(method="rtn", int8=("embedding",)))
    assert manifest.variants["base"].int8 == ("embedding",)
    assert all(set(manifest.variants[name].int8) == {"embedding", "head"} for name in names)
    only = tied.build("int8-head", names=("lora-head",), quantization=Quantization(method="rtn", int8=("head",)))
    assert (only.variants["base"].int8, only.variants["lora-head"].int8) == ((), ("head",))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("lora-head", "it changes the embedding or the head"), ("more", "its vocabulary has 306 tokens, and the base's 300")],
)
def test_a_live_variant_is_refused_with_the_reason(tied: Family, name: str, reason: str, tmp_path: Path) -> None:
    variant = Variant("v", {"a": 1.0}, delta=tied.trained[name].change, live={"a": 1.0})
    with pytest.raises(InputError, match=f"variant v cannot be live: {reason}.*use kind = 'merged'"):
        build_variants(Base.open(tied.folder / "base"), [variant], tmp_path / "out")


def test_a_checkpoint_whose_rows_are_not_its_configs_is_refused(tied: Family, tmp_path: Path) -> None:
    base = Base.open(tied.folder / "base")
    base.config["vocab_size"] = 320
    with pytest.raises(InputError, match=r"embed_tokens.weight .* has shape \(300, 64\); config.json gives \(320, 64\)"):
        build_variants(base, [Variant("base")], tmp_path / "out")


def mean_nats(logits: np.ndarray[Any, Any], targets: list[int]) -> float:
    """Returns the mean of -log p over the targets, computed in float64."""
    wide = logits.astype(np.float64)
    logs = wide - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True)) - wide.max(1, keepdims=True)
    return float(-logs[np.arange(len(targets)), targets].mean())


def assert_close(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], name: str = "") -> None:
    """Asserts equality to 1e-5 of the largest logit."""
    assert found.shape == wanted.shape, name
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max(), name
