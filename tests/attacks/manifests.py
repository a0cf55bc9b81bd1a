"""Attacks by a bundle's manifest, by the files in its folder, and by the path that a user gives."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from edgelora_runtime.bundle.manifest import MANIFEST
from tests.attacks.attack import Attack, Copy, make_copy, open_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Change = Callable[[dict[str, Any]], object]

NO_HASH = {"size": 1, "sha256": "0" * 64}


def edit(change: Change) -> Callable[[Copy], None]:
    def apply(copy: Copy) -> None:
        value = copy.read_manifest()
        change(value)
        copy.write_manifest(value)

    return apply


def put(*path: str, value: Any) -> Change:
    """Sets what stands at a path of keys. "?" is the first key of an object, or the first item of a list."""

    def change(manifest: dict[str, Any]) -> None:
        at: Any = manifest
        for key in path[:-1]:
            at = at[(0 if isinstance(at, list) else next(iter(at))) if key == "?" else key]
        at[path[-1]] = value

    return change


def drop(*path: str) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        at: Any = manifest
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]

    return change


def raw_text(change: Callable[[str], str | bytes]) -> Callable[[Copy], None]:
    """A change of the manifest's text."""

    def apply(copy: Copy) -> None:
        text = change(json.dumps(copy.read_manifest()))
        copy.write_raw(MANIFEST, text.encode() if isinstance(text, str) else text)

    return apply


def add_file(name: str) -> Change:
    return lambda manifest: manifest["files"].update({name: NO_HASH})


MANIFESTS: dict[str, Callable[[Copy], None]] = {
    "no JSON": raw_text(lambda text: text[:-1]),
    "not UTF-8": raw_text(lambda text: b"\xff\xfe" + text.encode()),
    "empty": raw_text(lambda text: ""),
    "a list": raw_text(lambda text: "[]"),
    "a hundred thousand brackets": raw_text(lambda text: "[" * 100_000),
    "a deep object": raw_text(lambda text: '{"a":' * 50_000 + "1" + "}" * 50_000),
    "17 MiB": raw_text(lambda text: text + " " * (17 << 20)),
    "7 MiB of adapters": raw_text(
        lambda text: text.replace('"adapters": {', '"adapters": {' + ",".join(f'"a{n}":0' for n in range(500_000)) + ",")
    ),
    "an object with a key twice": raw_text(lambda text: text.replace('"format"', '"base": 1, "base": 2, "format"')),
    "NaN": raw_text(lambda text: text.replace('"size": ', '"size": NaN, "x": ', 1)),
    "a number of a million digits": raw_text(
        lambda text: text.replace('"hidden_size": ', '"hidden_size": ' + "9" * 1_000_000, 1)
    ),
    "a number past infinity": raw_text(lambda text: text.replace('"mix": {}', '"mix": {"a": 1e999}', 1)),
    "another format": edit(put("format", value="other")),
    "version 2.0": edit(put("version", value="2.0")),
    "a version of control characters": edit(put("version", value="\x1b[2J\n1.0")),
    "a version that is a number": edit(put("version", value=1.0)),
    "no files": edit(drop("files")),
    "an unknown key": edit(put("evil\n\x1b[31m", value=1)),
    "a size below zero": edit(put("files", "tokenizer.json", "size", value=-1)),
    "a size of 2^60": edit(put("files", "tokenizer.json", "size", value=1 << 60)),
    "a size as text": edit(put("files", "tokenizer.json", "size", value="1")),
    "a hash in capitals": edit(put("files", "tokenizer.json", "sha256", value="A" * 64)),
    "a short hash": edit(put("files", "tokenizer.json", "sha256", value="a" * 63)),
    "a file in a parent folder": edit(add_file("../secret.bin")),
    "a file of the root": edit(add_file("/etc/passwd")),
    "a file on a drive": edit(add_file("C:secret.bin")),
    "a file in a folder": edit(add_file("sub/file.bin")),
    "a file behind a backslash": edit(add_file("..\\secret.bin")),
    "a device's file": edit(add_file("NUL.txt")),
    "a file of another case": edit(add_file("TOKENIZER.JSON")),
    "a file of control characters": edit(add_file("a\x1b[2J\n.bin")),
    "a file that turns the writing": edit(add_file("a\u202egpj.bin")),
    "a file of 10,000 characters": edit(add_file("a" * 10_000)),
    "the manifest as a file": edit(add_file(MANIFEST)),
    "a stream of a file": edit(add_file("tokenizer.json:evil")),
    "a reserved variant": edit(lambda m: m["variants"].update(auto=next(iter(m["variants"].values())))),
    "a variant of control characters": edit(lambda m: m["variants"].update({"\x1b]0;x\a": next(iter(m["variants"].values()))})),
    "a variant of a path": edit(lambda m: m["variants"].update({"../x": next(iter(m["variants"].values()))})),
    "no variant": edit(put("variants", value={})),
    "a default that is absent": edit(put("default_variant", value="nobody")),
    "a graph that is absent": edit(put("variants", "?", "graphs", "cpu", "file", value="nothing.onnx")),
    "a blob as a graph": edit(lambda m: put("variants", "?", "graphs", "cpu", "file", value=find_blob(m))(m)),
    "a graph as a blob": edit(lambda m: find_graph(m)["blobs"].append("tokenizer.json")),
    "a graph with another's blobs": edit(lambda m: find_graph(m).update(blobs=find_graph(m)["blobs"][:1])),
    "no cpu graph": edit(put("variants", "?", "graphs", value={})),
    "a stage of another graph": edit(
        lambda m: find_graph(m).update(stages=[{"file": "tokenizer.json", "blobs": find_graph(m)["blobs"]}])
    ),
    "a weight of 1e300": edit(put("variants", "?", "mix", value={"a": 1e300})),
    "a live weight of 1e39": edit(lambda m: [v["live"].update(a=1e39) for v in m["variants"].values() if v["kind"] == "live"]),
    "a merged variant with weights": edit(lambda m: [v["live"].update(a=1.0) for v in m["variants"].values()]),
    "a live adapter that is absent": edit(lambda m: [v["live"].update(zz=1.0) for v in m["variants"].values()]),
    "a method of control characters": edit(put("variants", "?", "method", value="ties\x1b[31m")),
    "a creator of control characters": edit(put("created_by", value="edgelora\n\x9b2J")),
    "a base that turns the writing": edit(put("base", "name", value="\u202eevil")),
    "an adapter's file in a parent folder": edit(put("adapters", "?", "file", value="../a.safetensors")),
    "a template in a parent folder": edit(
        put("adapters", "?", "texts", value={"tokenizer": "../t", "tokenizer_config": "x", "chat_templates": ["/etc/passwd"]})
    ),
    "2^40 layers": edit(put("model", "layers", value=1 << 40)),
    "no layers": edit(put("model", "layers", value=0)),
    "2^52 tokens": edit(put("model", "vocab_size", value=1 << 52)),
    "a context of 2^50": edit(put("model", "context_length", value=1 << 50)),
    "heads of 2^30": edit(put("model", "head_size", value=1 << 23)),
    "one head more": edit(lambda m: m["model"].update(kv_heads=m["model"]["kv_heads"] + 1)),
    "one layer more": edit(lambda m: m["model"].update(layers=m["model"]["layers"] + 1)),
    "one token more": edit(lambda m: m["model"].update(vocab_size=m["model"]["vocab_size"] + 1)),
    "a cache of another kind": edit(put("model", "cache", value="elsewhere")),
    "end tokens as text": edit(put("model", "eos_token_ids", value=["</s>"])),
    "a true number": edit(put("model", "layers", value=True)),
}


def find_graph(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(manifest["variants"].values()))["graphs"]["cpu"]
    return found


def find_blob(manifest: dict[str, Any]) -> str:
    return str(find_graph(manifest)["blobs"][0])


def change_file(change: Callable[[Path], object], name: str = "tokenizer.json") -> Callable[[Copy], None]:
    def apply(copy: Copy) -> None:
        change(copy.folder / name)

    return apply


def to_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def grow(path: Path) -> None:
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw + b" ")


FILES: dict[str, Callable[[Copy], None]] = {
    "a link to /etc/passwd": change_file(lambda path: to_link(path, "/etc/passwd")),
    "a link to itself": change_file(lambda path: to_link(path, path.name)),
    "a link to an endless device": change_file(lambda path: to_link(path, "/dev/zero")),
    "a pipe": change_file(to_pipe),
    "a folder": change_file(to_folder),
    "absent": change_file(lambda path: path.unlink()),
    "one byte longer": change_file(grow),
    "an unlisted file": lambda copy: copy.write_raw("evil.so", b"\x7fELF"),
    "an unlisted file of control characters": lambda copy: copy.write_raw("\x1b[2J\n", b""),
    "the manifest as a link": change_file(lambda path: to_link(path, "/etc/passwd"), MANIFEST),
    "the manifest as a pipe": change_file(to_pipe, MANIFEST),
    "the manifest as a folder": change_file(to_folder, MANIFEST),
}
PATHS: dict[str, Callable[[Path], Any]] = {
    "a file": lambda folder: folder / "bundle" / MANIFEST,
    "nothing": lambda folder: folder / "nowhere",
    "empty": lambda folder: "",
    "an endless device": lambda folder: "/dev/zero",
    "a zero byte": lambda folder: f"{folder}\0",
    "100,000 characters": lambda folder: f"{folder}/{'x' * 100_000}",
    "lone surrogates": lambda folder: f"{folder}/\udcff\ud800",
    "control characters": lambda folder: f"{folder}/\x1b[2J\n",
    "a number": lambda folder: 7,
    "bytes": lambda folder: os.fsencode(folder),
}


def open_path(choose: Callable[[Path], Any]) -> Callable[[Path], None]:
    def open_it(folder: Path) -> None:
        from edgelora_runtime import Bundle

        Bundle.open(choose(folder))

    return open_it


def list_attacks(bundle: Path) -> Iterator[Attack]:
    for name, change in MANIFESTS.items():
        yield Attack("manifest", name, make_copy(bundle, change), open_bundle)
    if sys.platform != "win32":  # which has no pipes in folders, and links for administrators alone
        for name, change in FILES.items():
            yield Attack("file", name, make_copy(bundle, change), open_bundle)
    for name, choose in PATHS.items():
        yield Attack("path", name, make_copy(bundle, lambda copy: None), open_path(choose))
