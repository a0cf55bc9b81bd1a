"""The manifest is read back as it was written, and hostile ones are refused with a typed error that names what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelora_runtime.bundle.manifest import (
    MANIFEST,
    MANIFEST_LIMIT,
    AdapterEntry,
    BaseEntry,
    FileEntry,
    GraphEntry,
    LiveSlots,
    Manifest,
    ModelEntry,
    QuantizationEntry,
    RouterClass,
    RouterEntry,
    TextsEntry,
    VariantEntry,
    check_variant_name,
    parse_manifest,
)
from edgelora_runtime.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable

HASH = "0123456789abcdef" * 4
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True).filter(lambda name: check_variant_name(name) is None)
NUMBERS = st.integers(1, (1 << 53) - 1)
SIZES = st.integers(1, (1 << 31) - 1)  # of a matrix
MODEL_SIZES = st.integers(1, 1 << 24)
WEIGHTS = st.floats(allow_nan=False, allow_infinity=False, width=32)
CACHES = st.sampled_from(["in_place", "growing"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(str.isprintable)

BROUGHT = TextsEntry("tokenizer.json", "tokenizer.json", ("a.chat_template.jinja",), (1, 2))


def example() -> Manifest:
    files = (
        "m.cpu.onnx",
        "live.cpu.onnx",
        f"{HASH}.bin",
        "a.adapter.safetensors",
        "tokenizer.json",
        "router.safetensors",
        "a.chat_template.jinja",
    )
    return Manifest(
        created_by="edgelora 0.1.0",
        default_variant="m",
        base=BaseEntry("base", HASH),
        model=ModelEntry("llama", 64, 2, 2, 16, 300, 1024, (1, 2)),
        quantization=QuantizationEntry(4, 32, True, "rtn"),
        adapters={"a": AdapterEntry(HASH, 4, "a.adapter.safetensors", texts=BROUGHT), "b": AdapterEntry(HASH, 2)},
        live_slots=(LiveSlots("x.lora_A", ("q.lora_B", "k.lora_B"), ("q", "k"), 64, (64, 32)),),
        variants={
            "m": VariantEntry("merged", {"a": 0.5, "b": 1.0}, "linear", {"cpu": GraphEntry(files[0], (files[2],))}),
            "l": VariantEntry(
                "live", {"a": 1.0}, "linear", {"cpu": GraphEntry(files[1], (files[2],))}, {"a": 1.0}, texts=BROUGHT
            ),
        },
        files={name: FileEntry(10, HASH) for name in files},
        router=RouterEntry(files[5], "bytes 3-5", (RouterClass("m", 9, 1, 0.5), RouterClass(None, 8, 0, None)), "l", 0.25, 0.5),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Manifests whose references hold."""
    adapters = draw(st.dictionaries(NAMES.map(str.lower), st.booleans(), max_size=3))
    names = draw(st.lists(NAMES.map(str.lower), min_size=1, max_size=3, unique=True))
    blobs = tuple(f"{number:064x}.bin" for number in range(draw(st.integers(0, 3))))
    with_file = [name for name, has_file in adapters.items() if has_file]
    variants = {}
    files = dict.fromkeys(blobs)
    files |= dict.fromkeys(f"{name}.adapter.safetensors" for name in with_file)
    for name in names:
        live = draw(st.dictionaries(st.sampled_from(with_file), WEIGHTS, max_size=2)) if with_file else {}
        graph = "live.cpu.onnx" if live else f"{name}.cpu.onnx"
        files[graph] = None
        variants[name] = VariantEntry(
            "live" if live else "merged",
            draw(st.dictionaries(TEXT, WEIGHTS, max_size=2)),
            draw(TEXT),
            {"cpu": GraphEntry(graph, blobs)},
            live,
        )
        if not live:
            mixed = variants[name].mix
            by_pattern = st.dictionaries(TEXT, WEIGHTS, max_size=2)
            variants[name] = replace(
                variants[name],
                weights=draw(st.dictionaries(st.sampled_from(sorted(mixed)), by_pattern, max_size=2)) if mixed else {},
                density=draw(st.none() | WEIGHTS),
                seed=draw(st.none() | st.integers(0, (1 << 53) - 1)),
                vocab_size=draw(st.none() | SIZES),
                own_vocab=draw(st.sampled_from([(), ("embedding",), ("head",), ("embedding", "head")])),
            )
    slots = draw(
        st.lists(
            st.integers(1, 3).flatmap(
                lambda count: st.builds(
                    LiveSlots,
                    TEXT,
                    *(st.tuples(*[TEXT] * count) for _ in range(2)),
                    SIZES,
                    st.tuples(*[SIZES] * count),
                )
            ),
            max_size=2,
        )
    )
    return Manifest(
        created_by=draw(TEXT),
        default_variant=names[0],
        base=BaseEntry(draw(TEXT), draw(TEXT)),
        model=draw(
            st.builds(ModelEntry, TEXT, *[MODEL_SIZES] * 6, st.lists(st.integers(0, 1 << 40), max_size=3).map(tuple), CACHES)
        ),
        quantization=draw(st.builds(QuantizationEntry, st.integers(0, 64), NUMBERS, st.booleans(), TEXT)),
        adapters={
            name: AdapterEntry(HASH, draw(st.integers(0, 999)), f"{name}.adapter.safetensors" if name in with_file else None)
            for name in adapters
        },
        live_slots=tuple(slots),
        variants=variants,
        files={name: FileEntry(draw(st.integers(0, (1 << 53) - 1)), HASH) for name in files},
        router=draw(st.none() | routers(next(iter(files)), names)) if files else None,
    )


@st.composite
def routers(draw: st.DrawFn, file: str, names: list[str]) -> RouterEntry:
    shares = st.none() | st.floats(0, 1)
    counts = st.integers(0, 99)
    variants: list[str | None] = [*draw(st.lists(st.sampled_from(names), min_size=1, unique=True)), None]
    classes = tuple(RouterClass(name, draw(counts), draw(counts), draw(shares)) for name in variants)
    return RouterEntry(file, "bytes 3-5", classes, draw(st.sampled_from(names)), draw(st.floats(0, 1)), draw(shares))


@given(manifests())
@settings(deadline=None)
def test_parse_inverts_dump(manifest: Manifest) -> None:
    assert parse_manifest(manifest.dump()) == manifest


def test_dump_is_stable_and_ends_in_a_newline() -> None:
    assert example().dump() == parse_manifest(example().dump()).dump()
    assert example().dump().endswith(b"}\n")
    assert json.loads(example().dump())["version"] == "1.0"


def changed(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change that sets the item at a path."""

    def change(manifest: dict[str, Any]) -> None:
        target: Any = manifest
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


def removed(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        target: Any = manifest
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]

    return change


def file_named(name: str) -> Callable[[dict[str, Any]], None]:
    return changed("files", name, value={"size": 1, "sha256": HASH})


def variant_named(name: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["variants"][name] = manifest["variants"]["m"]

    return change


# What is done to a good manifest, and what the refusal must mention.
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "live variant with a vocabulary of its own": (
        changed("variants", "l", "vocab_size", value=9),
        "live and has a vocabulary of 9",
    ),
    "one graph of two vocabularies": (
        lambda value: value["variants"].update(n=value["variants"]["m"] | {"vocab_size": 9}),
        "with vocabularies of different sizes",
    ),
    "no tokens": (changed("variants", "m", "vocab_size", value=0), "merged and has a vocabulary of 0"),
    "vocabulary as text": (changed("variants", "m", "vocab_size", value="9"), "vocab_size should be a int"),
    "unknown matrix of its own": (changed("variants", "m", "own_vocab", value=["norm"]), "should be 'embedding' or 'head'"),
    "other format": (changed("format", value="zip"), "format"),
    "no format": (removed("format"), "format"),
    "no version": (removed("version"), "version"),
    "next major version": (changed("version", value="2.0"), "version 2.0"),
    "version zero": (changed("version", value="0.9"), "version 0.9"),
    "version as a number": (changed("version", value=1.0), "version"),
    "version with junk": (changed("version", value="1.0; rm"), "version"),
    "version in other digits": (changed("version", value="１.０"), "version"),
    "endless version": (changed("version", value="1." + "9" * 5000), "version"),
    "unknown key": (changed("plugin", value="x.so"), "unknown plugin"),
    "unknown key in a file": (changed("files", "tokenizer.json", "url", value="http://x"), "unknown url"),
    "merge base of an unknown kind": (changed("variants", "m", "merge_base", value="nf4"), "'float' or 'trained'"),
    "a trained base of an unknown kind": (changed("variants", "m", "trained_on", value="q8"), "trained_on"),
    "a trained base that is not named": (
        changed("variants", "m", "merge_base", value="trained"),
        "does not say which",
    ),
    "loss as text": (changed("variants", "m", "merge_losses", value={"trained": "low"}), "merge_losses"),
    "unknown key in a variant": (changed("variants", "m", "custom_ops", value=[]), "unknown custom_ops"),
    "missing key": (removed("files"), "lacks files"),
    "missing model key": (removed("model", "layers"), "lacks layers"),
    "null for an object": (changed("model", value=None), "model should be an object"),
    "list for an object": (changed("variants", value=[]), "variants should be an object"),
    "object for a list": (changed("live_slots", value={}), "live_slots should be a list"),
    "text for a list": (changed("variants", "m", "graphs", "cpu", "blobs", value="abc"), "should be a list"),
    "cache of an unknown kind": (changed("model", "cache", value="ring"), "model.cache should be 'in_place' or 'growing'"),
    "text for a number": (changed("model", "layers", value="2"), "model.layers"),
    "number for text": (changed("created_by", value=3), "created_by"),
    "terminal codes": (changed("created_by", value="\x1b[2J"), "cannot be printed"),
    "true for a number": (changed("model", "layers", value=True), "model.layers"),
    "1 for true": (changed("quantization", "symmetric", value=1), "symmetric"),
    "fraction for a whole number": (changed("files", "tokenizer.json", "size", value=10.5), "size"),
    "text for a weight": (changed("variants", "m", "mix", "a", value="0.5"), "mix"),
    "true for a weight": (changed("variants", "m", "mix", "a", value=True), "mix"),
    "negative size": (changed("files", "tokenizer.json", "size", value=-1), "size"),
    "huge size": (changed("files", "tokenizer.json", "size", value=1 << 53), "size"),
    "huge weight": (changed("variants", "m", "mix", "a", value=10**400), "mix"),
    "infinite weight": (changed("variants", "l", "live", "a", value=float("1e300") * 1e300), "JSON"),
    "not a number": (changed("variants", "l", "live", "a", value=float("nan")), "JSON"),
    "router without a file": (
        changed("router", "file", value="r.safetensors"),
        "the router uses r.safetensors, which files lacks",
    ),
    "router of unknown features": (changed("router", "features", value="bytes 2"), "router.features should be 'bytes 3-5'"),
    "router without classes": (changed("router", "classes", value=[]), "classes are not each of another variant"),
    "router of nothing else": (changed("router", "classes", 0, "variant", value=None), "classes are not each of another variant"),
    "router of an unknown variant": (changed("router", "classes", 0, "variant", value="x"), "the router names 'x'"),
    "router with an unknown fallback": (changed("router", "fallback", value="x"), "the router names 'x'"),
    "router with a large threshold": (changed("router", "threshold", value=1.5), "router.threshold is 1.5"),
    "router with text for an accuracy": (changed("router", "classes", 0, "accuracy", value="high"), "accuracy"),
    "unknown key in a router": (changed("router", "url", value="http://x"), "unknown url"),
    "no layers": (changed("model", "layers", value=0), "model.layers is 0"),
    "no vocabulary": (changed("model", "vocab_size", value=0), "model.vocab_size is 0"),
    "no context": (changed("model", "context_length", value=0), "model.context_length is 0"),
    "negative end token": (changed("model", "eos_token_ids", value=[-1]), "eos_token_ids"),
    "hash too short": (changed("files", "tokenizer.json", "sha256", value="00"), "sha256"),
    "hash in upper case": (changed("files", "tokenizer.json", "sha256", value=HASH.upper()), "sha256"),
    "hash with a newline": (changed("files", "tokenizer.json", "sha256", value=HASH + "\n"), "sha256"),
    "parent folder": (file_named(".."), "'..'"),
    "file in the parent folder": (file_named("../x"), "'../x'"),
    "file in a subfolder": (file_named("a/x"), "'a/x'"),
    "absolute name": (file_named("/etc/passwd"), "/etc/passwd"),
    "drive letter": (file_named("C:x"), "'C:x'"),
    "backslash": (file_named("a\\x"), "not a name"),
    "hidden file": (file_named(".x"), "'.x'"),
    "empty name": (file_named(""), "''"),
    "zero byte": (file_named("a\0b"), "not a name"),
    "newline": (file_named("a\n"), "not a name"),
    "space at the end": (file_named("a "), "'a '"),
    "dot at the end": (file_named("a."), "'a.'"),
    "letter that composes": (file_named("e\u0301"), "not a name"),
    "right-to-left override": (file_named("a\u202egnp.bin"), "not a name"),
    "lone surrogate": (file_named("a\ud800"), "not a name"),
    "device": (file_named("nul"), "'nul'"),
    "device with an extension": (file_named("Com1.bin"), "'Com1.bin'"),
    "long name": (file_named("a" * 201), "not a name"),
    "the manifest itself": (file_named(MANIFEST), MANIFEST),
    "names that differ in case": (file_named("Tokenizer.json"), "differ only in case"),
    "reserved variant": (variant_named("auto"), "reserved"),
    "reserved variant in capitals": (variant_named("LIVE"), "reserved"),
    "variant with a slash": (variant_named("a/b"), "variant 'a/b'"),
    "variant of dots": (variant_named(".."), "variant '..'"),
    "variant without a name": (variant_named(""), "variant ''"),
    "variant with an escape code": (variant_named("a\x1b[2J"), "variant"),
    "long variant": (variant_named("a" * 65), "variant"),
    "adapter with a slash": (changed("adapters", "../b", value={"sha256": HASH, "rank": 1}), "adapter '../b'"),
    "unknown default": (changed("default_variant", value="x"), "default_variant 'x'"),
    "no variant": (changed("variants", value={}), "default_variant"),
    "unknown kind": (changed("variants", "m", "kind", value="remote"), "'merged' or 'live'"),
    "kind of another type": (changed("variants", "m", "kind", value=["merged"]), "'merged' or 'live'"),
    "no cpu graph": (changed("variants", "m", "graphs", value={}), "no cpu graph"),
    "texts that are not listed": (
        changed("variants", "l", "texts", "chat_templates", value=["../x.jinja"]),
        "variant l uses ../x.jinja, which files lacks",
    ),
    "an adapter's texts that are not listed": (changed("adapters", "a", "texts", "tokenizer", value="x"), "adapter a uses x"),
    "an end that is no token": (changed("variants", "l", "texts", "eos_token_ids", value=[-1]), "a whole number"),
    "graph that is not listed": (changed("variants", "m", "graphs", "cpu", "file", value="/etc/x.onnx"), "files lacks"),
    "blob that is not listed": (changed("variants", "m", "graphs", "cpu", "blobs", value=["x.bin"]), "x.bin"),
    "weights by module of an adapter that is not mixed": (
        changed("variants", "m", "weights", value={"x": {"*": 1.0}}),
        "variant m weighs x, which its mix lacks",
    ),
    "weights by module of a live variant": (changed("variants", "l", "weights", value={"a": {"*": 1.0}}), "is live and weighs a"),
    "pattern with an escape code": (changed("variants", "m", "weights", value={"a": {"\x1b[2J": 1.0}}), "cannot be printed"),
    "weight of a pattern as text": (changed("variants", "m", "weights", value={"a": {"*": "1"}}), "a float"),
    "negative seed": (changed("variants", "m", "seed", value=-1), "a whole number"),
    "live weights on a merged variant": (changed("variants", "m", "live", value={"a": 1.0}), "is merged and live is"),
    "live variant without weights": (changed("variants", "l", "live", value={}), "is live and live is"),
    "live adapter that is not there": (changed("variants", "l", "live", value={"x": 1.0}), "needs adapter x"),
    "live adapter without a file": (changed("variants", "l", "live", value={"b": 1.0}), "needs adapter b"),
    "adapter file that is not listed": (changed("adapters", "a", "file", value="x"), "adapter a uses x"),
    "slots of unequal length": (changed("live_slots", 0, "rows", value=[64]), "live_slots"),
    "slots without parts": (
        changed("live_slots", value=[{"a": "x", "b": [], "modules": [], "columns": 1, "rows": []}]),
        "live_slots",
    ),
}


@pytest.mark.parametrize(("change", "mention"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_manifest_is_refused(change: Callable[[dict[str, Any]], None], mention: str) -> None:
    value = json.loads(example().dump())
    change(value)
    with pytest.raises(IntegrityError) as caught:
        parse_manifest(json.dumps(value).encode())
    assert mention in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "cut": (example().dump()[:-20], "not valid JSON"),
    "binary": (bytes(range(256)), "not valid JSON"),
    "not UTF-8": (example().dump().replace(b"rtn", b"\xff\xfe"), "not valid JSON"),
    "two objects": (example().dump() * 2, "not valid JSON"),
    "a list": (b"[]", "format"),
    "a number": (b"1", "format"),
    "null": (b"null", "format"),
    "deep lists": (b"[" * 100_000, "not valid JSON"),
    "deep objects": (b'{"a":' * 100_000, "not valid JSON"),
    "deep but closed": (b"[" * 50_000 + b"]" * 50_000, "not valid JSON"),
    "a key twice": (example().dump().replace(b'"format"', b'"created_by": "x", "format"', 1), "repeats a key"),
    "a file twice": (
        example().dump().replace(b'"files": {', b'"files": {"tokenizer.json": {"size": 0, "sha256": ""},'),
        "repeats",
    ),
    "a number of a million digits": (
        example().dump().replace(b'"layers": 2', b'"layers": ' + b"9" * 1_000_000),
        "not valid JSON",
    ),
    "a float that overflows": (example().dump().replace(b'"a": 0.5', b'"a": 1e999'), "mix"),
    "a negative float that overflows": (example().dump().replace(b'"a": 0.5', b'"a": -1e999'), "mix"),
    "NaN": (example().dump().replace(b'"a": 0.5', b'"a": NaN'), "NaN"),
    "Infinity": (example().dump().replace(b'"a": 0.5', b'"a": -Infinity'), "Infinity"),
    "too large": (b" " * (MANIFEST_LIMIT + 1), "limit"),
    "byte order mark": (b"\xef\xbb\xbf" + example().dump(), "not valid JSON"),
}


@pytest.mark.parametrize(("raw", "mention"), TEXTS.values(), ids=TEXTS.keys())
def test_text_that_is_no_manifest_is_refused(raw: bytes, mention: str) -> None:
    assert raw != example().dump()
    with pytest.raises(IntegrityError) as caught:
        parse_manifest(raw)
    assert mention in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@given(st.data())
@settings(deadline=None)
def test_anything_in_any_place_is_read_or_refused(data: st.DataObject) -> None:
    """Replaces one random item of a good manifest by random JSON: the answer is a Manifest or an IntegrityError."""
    value = json.loads(example().dump())
    target: Any = value
    while True:
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        key = data.draw(st.sampled_from(keys))
        if not target[key] or not isinstance(target[key], dict | list) or data.draw(st.booleans()):
            break
        target = target[key]
    target[key] = data.draw(JSON)
    try:
        parsed = parse_manifest(json.dumps(value).encode())
    except IntegrityError:
        return
    assert parse_manifest(parsed.dump()) == parsed


def test_later_minor_version_is_read_and_its_news_skipped() -> None:
    value = json.loads(example().dump())
    value["version"] = "1.7"
    value["vision"] = {"file": "vision.onnx"}
    value["variants"]["m"]["speed"] = 0.99
    value["files"]["tokenizer.json"]["mime"] = "application/json"
    assert parse_manifest(json.dumps(value).encode()) == example()


def test_keys_that_have_a_default_may_be_absent() -> None:
    """The keys that docs/reference/bundle-format.md gives a default."""
    value = json.loads(example().dump())
    figures = {"tokens": 9, "kl_mean": 0.1, "kl_p99": 0.2, "adapter_kl": 2.0, "retention": 0.95, "top1": 1, "perplexity": 2.0}
    value["variants"]["m"]["fidelity"] = {"outcome": "passed", "kernels": "onnxruntime", **figures, "teacher_perplexity": 2.0}
    del value["model"]["cache"], value["model"]["eos_token_ids"], value["router"]
    for adapter in value["adapters"].values():
        del adapter["draft_table"]
    for variant in value["variants"].values():
        for key in ("calibration", "int8", "merge_base", "trained_on", "merge_losses", "weights", "density", "seed"):
            del variant[key]
        del variant["vocab_size"], variant["own_vocab"]
        for graph in variant["graphs"].values():
            del graph["stages"]
    read = parse_manifest(json.dumps(value).encode())
    written = example()
    fidelity = read.variants["m"].fidelity
    assert fidelity is not None and (fidelity.products, fidelity.trained_kl) == ({}, None)
    expected = replace(written.variants["m"], fidelity=fidelity)
    model = replace(written.model, eos_token_ids=())
    assert read == replace(written, router=None, model=model, variants=written.variants | {"m": expected})


def test_later_minor_version_is_as_strict_about_what_is_known() -> None:
    value = json.loads(example().dump())
    value["version"] = "1.7"
    value["model"]["layers"] = "many"
    with pytest.raises(IntegrityError, match=r"model\.layers"):
        parse_manifest(json.dumps(value).encode())


def test_all_broken_references_are_named_at_once() -> None:
    value = json.loads(example().dump())
    value["default_variant"] = "x"
    value["model"]["layers"] = 0
    value["adapters"]["a"]["file"] = "y"
    with pytest.raises(IntegrityError) as caught:
        parse_manifest(json.dumps(value).encode())
    for mention in ("default_variant 'x'", "model.layers is 0", "adapter a uses y"):
        assert mention in str(caught.value)


@pytest.mark.parametrize("name", ["a", "sql-live", "v1.2", "A_b", "0", "x" * 64, "console", "com10", "Live-1"])
def test_good_variant_names(name: str) -> None:
    assert check_variant_name(name) is None


@pytest.mark.parametrize(
    "name", ["", "-a", ".a", "a b", "a/b", "ä", "x" * 65, "auto", "Auto", "live", "con", "NUL", "com1", "lpt9.x", "a\n"]
)
def test_bad_variant_names(name: str) -> None:
    """A device's name among them: the graph of variant nul would be nul.cpu.onnx, which Windows cannot store."""
    assert check_variant_name(name) is not None
