"""Model names: what each stands for, and that an unknown one is never the base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora_runtime.bundle.folder import Bundle
from edgelora_runtime.serve.failures import RequestFailed
from edgelora_runtime.serve.names import ModelNames

if TYPE_CHECKING:
    from edgelora_runtime.bundle.manifest import Manifest


@pytest.fixture(scope="module")
def manifest(routed_bundle: Path) -> Manifest:
    return Bundle.open(routed_bundle).manifest


@pytest.mark.parametrize(
    ("name", "variant", "mix"),
    [
        ("base", "base", None),
        ("one/plain", "plain", None),
        ("auto", "auto", None),
        ("plain:0.7+rslora:0.3", None, {"plain": 0.7, "rslora": 0.3}),
        ("plain:-4e-1+rslora", None, {"plain": -0.4, "rslora": 1.0}),
        ("plain:.5", None, {"plain": 0.5}),
    ],
)
def test_names_of_one_bundle(manifest: Manifest, name: str, variant: str | None, mix: dict[str, float] | None) -> None:
    found = ModelNames({"one": manifest}).find(name)
    assert (found.bundle, found.variant, found.mix) == ("one", variant, mix)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bas", "did you mean 'base'"),
        ("", "there is base"),
        ("BASE", "there is base"),
        ("two/base", "no model 'two/base'"),
        ("nobody:0.5", "no live adapter nobody"),
        ("plain:0.5+", "no model"),
        ("plain:nan", "no model"),
        ("plain :0.5", "no model"),
        ("x" * 100_000, "no model"),
    ],
)
def test_unknown_names_are_404(manifest: Manifest, name: str, said: str) -> None:
    with pytest.raises(RequestFailed, match=said) as caught:
        ModelNames({"one": manifest}).find(name)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


@pytest.mark.parametrize("name", ["plain:1+plain:2", "plain:1e999"])
def test_mixes_that_cannot_be_are_400(manifest: Manifest, name: str) -> None:
    with pytest.raises(RequestFailed) as caught:
        ModelNames({"one": manifest}).find(name)
    assert caught.value.status == 400


def test_several_bundles_need_their_names(manifest: Manifest) -> None:
    names = ModelNames({"one": manifest, "two": manifest})
    assert names.find("two/plain").bundle == "two"
    assert names.find("two/plain:0.5").mix == {"plain": 0.5}
    assert {"one/base", "two/base", "one/auto"} <= {choice.name for choice in names.listed}
    with pytest.raises(RequestFailed, match="no model 'plain'"):
        names.find("plain")


def test_lora_is_the_mix_of_the_same_adapters(manifest: Manifest) -> None:
    names = ModelNames({"one": manifest})
    adapters = [name for name, entry in manifest.adapters.items() if entry.file is not None]
    found = names.find("plain-live", [(adapters.index("plain"), 0.7), ("rslora", 0.3)])
    assert found.key == names.find("rslora:0.3+plain:0.7").key
    for lora, said in (([(99, 1.0)], "no adapter 99"), ([(-1, 1.0)], "no adapter -1"), ([("plain", 1.0)] * 2, "twice")):
        with pytest.raises(RequestFailed, match=said):
            names.find("plain-live", lora)
    with pytest.raises(RequestFailed, match="merged"):
        names.find("plain", [(0, 1.0)])


GOLDEN = Bundle.open(Path(__file__).resolve().parents[1] / "bundle" / "golden" / "bundle").manifest


@given(st.text(max_size=40) | st.from_regex(r"(a|base|one/|:|\+|-|[0-9.e])*", fullmatch=True))
def test_any_text_is_a_model_or_a_refusal(text: str) -> None:
    try:
        found = ModelNames({"one": GOLDEN}).find(text)
    except RequestFailed as failed:
        assert failed.status in (400, 404)
        assert failed.message.isprintable()
    else:
        assert (found.mix or {"a": 0.0}).keys() == {"a"}
        assert found.mix is not None or found.variant in GOLDEN.variants
