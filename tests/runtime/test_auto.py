"""Variant "auto": each request runs on the variant that the bundle's router picks, and reports it."""

from __future__ import annotations

import hashlib
import json
import threading
from shutil import copytree
from typing import TYPE_CHECKING, Any

import pytest

from edgelora_runtime import InputError, IntegrityError, Route, Runtime, UsageError
from edgelora_runtime.bundle.manifest import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CAT, DAY, ELSE = "the cat number 77 sat", "a day in the sun, 77 of them", "日本語 → §§"
PICKED = {CAT: "plain", DAY: "other", ELSE: "base"}


@pytest.fixture
def routed(routed_bundle: Path) -> Iterator[Runtime]:
    with Runtime(routed_bundle, threads=1) as opened:
        yield opened


@pytest.mark.parametrize(("prompt", "variant"), PICKED.items())
def test_auto_runs_what_the_router_picks(routed: Runtime, prompt: str, variant: str) -> None:
    found = routed.generate(prompt, variant="auto", max_tokens=8)
    named = routed.generate(prompt, variant=variant, max_tokens=8)
    assert (found.variant, found.receipt.variant, found.tokens) == (variant, variant, named.tokens)
    assert found.route is not None
    assert (found.route.variant, found.route.fallback) == (variant, variant == "base")
    assert 0.5 < found.route.confidence <= 1
    assert found.route.milliseconds > 0
    assert named.route is None
    assert routed.current == "base", "a request does not change the current variant"


def test_streams_are_routed_when_they_are_created(routed: Runtime) -> None:
    stream = routed.stream(CAT, variant="auto", max_tokens=5)
    assert stream.generation is None
    text = "".join(stream)
    assert stream.generation is not None
    assert stream.generation.route is not None
    assert (stream.generation.variant, stream.generation.text) == ("plain", text)


def test_route_picks_the_same_variant_and_generates_nothing(routed: Runtime) -> None:
    for prompt, variant in PICKED.items():
        route = routed.route(prompt)
        assert isinstance(route, Route)
        assert (route.variant, route.fallback) == (variant, variant == "base")
        generated = routed.generate(prompt, variant="auto", max_tokens=1).route
        assert generated is not None
        assert generated.confidence == route.confidence


def test_tokens_are_routed_as_their_text(routed: Runtime) -> None:
    for prompt in (CAT, DAY):
        route = routed.route(routed.encode(prompt))
        assert route.variant == PICKED[prompt]
        assert route.confidence == routed.route(prompt).confidence
    assert routed.generate(routed.encode(CAT), variant="auto", max_tokens=2).variant == "plain"


def test_a_conversation_is_routed_by_its_last_turn(routed: Runtime) -> None:
    talk = [{"role": "user", "content": DAY}, {"role": "assistant", "content": DAY}, {"role": "user", "content": CAT}]
    assert routed.generate(talk, variant="auto", max_tokens=2).variant == "plain"
    assert routed.generate(talk[:1], variant="auto", max_tokens=2).variant == "other"
    assert routed.route(talk).confidence == routed.route(CAT).confidence
    parts: Any = [*talk, {"role": "user", "content": [{"type": "text", "text": DAY}]}]
    assert routed.generate(parts, variant="auto", max_tokens=2).variant == "other"
    assert routed.route([{"role": "user", "content": None}]).variant == routed.route("").variant


@pytest.mark.parametrize("prompt", [[], [300], [-1], [1, "x"], [{"role": "user", "content": 3}]])
def test_what_cannot_be_routed_is_refused(routed: Runtime, prompt: Any) -> None:
    with pytest.raises(InputError):
        routed.route(prompt)


def test_auto_cannot_be_switched_to_and_has_no_logits(routed: Runtime) -> None:
    for call in (
        lambda: routed.switch("auto"),
        lambda: routed.logits([5, 6], variant="auto"),
        lambda: list(routed.iterate_logits([5, 6], variant="auto")),
    ):
        with pytest.raises(UsageError, match="'auto' is chosen per prompt: give it to generate, stream or route"):
            call()
    with pytest.raises(UsageError, match="both variant 'auto' and a mix"):
        routed.generate(CAT, variant="auto", mix={"plain": 1.0})


def test_a_bundle_without_a_router_says_how_to_get_one(runtime: Runtime) -> None:
    for call in (lambda: runtime.route(CAT), lambda: runtime.generate(CAT, variant="auto")):
        with pytest.raises(UsageError, match=r"no router .* \[router\] table in the recipe, or name one of base, plain"):
            call()


def test_a_closed_runtime_routes_again(routed: Runtime) -> None:
    before = routed.route(CAT)
    routed.close()
    assert routed.route(CAT).confidence == before.confidence


def test_threads_get_their_own_routes(routed_bundle: Path) -> None:
    prompts = [*PICKED] * 8
    found: dict[int, tuple[str, str]] = {}
    with Runtime(routed_bundle, threads=1) as shared:

        def ask(number: int) -> None:
            generation = shared.generate(prompts[number], variant="auto", max_tokens=4)
            assert generation.route is not None
            found[number] = (generation.route.variant, generation.variant)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {number: (PICKED[prompt],) * 2 for number, prompt in enumerate(prompts)}


def test_a_damaged_router_is_refused_and_named_variants_still_run(routed_bundle: Path, tmp_path: Path) -> None:
    folder = copytree(routed_bundle, tmp_path / "bundle")
    file = folder / "router.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 64
    file.write_bytes(raw)
    with Runtime(folder, threads=1) as opened:
        with pytest.raises(IntegrityError, match=r"router\.safetensors is not the file that bundle\.json lists"):
            opened.generate(CAT, variant="auto")
        assert opened.generate(CAT, variant="plain", max_tokens=1).tokens


def test_a_listed_file_that_is_not_a_router_is_refused(routed_bundle: Path, tmp_path: Path) -> None:
    folder = copytree(routed_bundle, tmp_path / "bundle")
    manifest = json.loads((folder / MANIFEST).read_bytes())
    (folder / "router.safetensors").write_bytes(b"PK")
    manifest["files"]["router.safetensors"] = {"size": 2, "sha256": hashlib.sha256(b"PK").hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with Runtime(folder, threads=1) as opened, pytest.raises(IntegrityError, match="not a readable safetensors"):
        opened.route(CAT)
