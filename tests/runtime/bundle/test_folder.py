"""Opening a bundle refuses everything that differs from its manifest; verify() finds every flipped bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from typing import TYPE_CHECKING, Any

import pytest

from edgelora_export.bundle.entries import describe_files
from edgelora_runtime import Bundle, EdgeloraError, InputError, IntegrityError, Runtime, UsageError
from edgelora_runtime.bundle.manifest import MANIFEST, parse_manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def read(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    return value


def write(folder: Path, value: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(value), encoding="utf-8")


def replace(folder: Path, name: str, raw: bytes) -> None:
    """Replaces a file and updates the manifest, as an attacker who can write both would do."""
    value = read(folder)
    (folder / name).write_bytes(raw)
    value["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    write(folder, value)


def a_blob(folder: Path) -> Path:
    return next(folder.glob("*.bin"))


def test_a_good_bundle_opens_and_verifies(bundle4: Path) -> None:
    bundle = Bundle.open(bundle4)
    seen: list[str] = []
    assert bundle.verify(seen.append) == []
    assert seen == list(bundle.manifest.files)
    assert set(bundle.manifest.files) | {MANIFEST} == {path.name for path in bundle4.iterdir()}


def test_the_manifest_on_disk_is_the_one_that_dump_writes(bundle4: Path) -> None:
    raw = (bundle4 / MANIFEST).read_bytes()
    assert parse_manifest(raw).dump() == raw


def test_blobs_are_named_by_their_hash(bundle4: Path) -> None:
    blobs = list(bundle4.glob("*.bin"))
    assert blobs
    for blob in blobs:
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.stem


def test_graphs_are_small(bundle4: Path) -> None:
    for graph in bundle4.glob("*.onnx"):
        assert graph.stat().st_size < 1 << 20


# --- the folder ---------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_link(path: Path) -> None:
    """Replaces a file by a link to the same bytes outside the bundle."""
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def to_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def to_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: os.truncate(path, 0),
    "one byte short": truncate,
    "one byte long": extend,
    "a folder": to_folder,
    "a link": to_link,
    "a dangling link": to_dangling_link,
    "a pipe": to_fifo,
    "a device": to_device,
}


@pytest.mark.parametrize("pattern", ["*.bin", "base.cpu.onnx", "tokenizer.json", "plain.adapter.safetensors"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_file_is_named_on_opening(bundle_copy: Path, damage: Callable[[Path], None], pattern: str) -> None:
    path = next(bundle_copy.glob(pattern))
    damage(path)
    with pytest.raises(IntegrityError) as caught:
        Bundle.open(bundle_copy)
    assert path.name in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("damage", [do for what, do in DAMAGE.items() if what != "one byte short"])  # that is the last newline
def test_damaged_manifest_is_refused(bundle_copy: Path, damage: Callable[[Path], None]) -> None:
    damage(bundle_copy / MANIFEST)
    with pytest.raises(EdgeloraError) as caught:
        Bundle.open(bundle_copy)
    assert isinstance(caught.value, InputError | IntegrityError)


@pytest.mark.parametrize("name", ["extra.bin", "evil.so", ".hidden", "bundle.json~", "sub/file"])
def test_unlisted_file_is_named(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).parent.mkdir(exist_ok=True)
    (bundle_copy / name).write_bytes(b"")
    with pytest.raises(IntegrityError, match=name.split("/")[0].replace(".", r"\.")):
        Bundle.open(bundle_copy)


def test_all_damage_is_reported_at_once(bundle_copy: Path) -> None:
    names = sorted(path.name for path in bundle_copy.glob("*.json") if path.name != MANIFEST)
    assert len(names) > 2
    truncate(bundle_copy / names[0])
    (bundle_copy / names[1]).unlink()
    (bundle_copy / "extra").touch()
    with pytest.raises(IntegrityError) as caught:
        Bundle.open(bundle_copy)
    for name in (*names[:2], "extra"):
        assert name in str(caught.value)


@pytest.mark.parametrize("kind", ["absent", "empty folder", "a file"])
def test_a_folder_without_a_bundle_is_an_input_error(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "x"
    if kind == "empty folder":
        target.mkdir()
    elif kind == "a file":
        target.touch()
    with pytest.raises(InputError, match="no bundle at"):
        Bundle.open(target)


def test_unlisted_files_cannot_be_read(bundle4: Path) -> None:
    bundle = Bundle.open(bundle4)
    for name in ("../recipe.toml", "/etc/passwd", "nothing", MANIFEST):
        with pytest.raises(IntegrityError, match="lists no file"):
            bundle.read(name)


# --- bytes --------------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_file_is_found_and_the_file_named(bundle_copy: Path) -> None:
    random_ = random.Random(0)
    bundle = Bundle.open(bundle_copy)
    for name, entry in bundle.manifest.files.items():
        path = bundle_copy / name
        good = path.read_bytes()
        damaged = bytearray(good)
        position = random_.choice([0, entry.size - 1, random_.randrange(entry.size)])
        damaged[position] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged)
        assert bundle.verify() == [name]
        with pytest.raises(IntegrityError, match=re.escape(name)):
            Bundle.open(bundle_copy, verify="full")
        path.write_bytes(good)
    assert bundle.verify() == []


def test_a_file_swapped_for_a_link_after_opening_is_not_followed(bundle_copy: Path) -> None:
    bundle = Bundle.open(bundle_copy)
    to_link(bundle_copy / "tokenizer.json")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        bundle.read("tokenizer.json")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        bundle.verify()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_runtime_reads_no_text_with_a_wrong_hash(bundle_copy: Path, name: str) -> None:
    raw = bytearray((bundle_copy / name).read_bytes())
    raw[-2] ^= 1
    (bundle_copy / name).write_bytes(raw)
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")), Runtime(bundle_copy) as runtime:
        runtime.encode([{"role": "user", "content": "hi"}])  # which is when the template is read


def flip_the_middle(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_runtime_opens_no_adapter_with_a_wrong_hash(bundle_copy: Path) -> None:
    flip_the_middle(bundle_copy / "plain.adapter.safetensors")
    with Runtime(bundle_copy) as runtime:
        runtime.switch("base")
        with pytest.raises(IntegrityError, match="is not the file that"):
            runtime.switch("plain-live")


def test_a_graph_with_a_wrong_hash_is_found_on_opening_and_before_its_session(bundle_copy: Path) -> None:
    with Runtime(bundle_copy) as runtime:
        flip_the_middle(bundle_copy / "plain.cpu.onnx")
        with pytest.raises(IntegrityError, match="is not the file that"):
            runtime.switch("plain")
    with pytest.raises(IntegrityError, match=r"plain\.cpu\.onnx is not the file that"):
        Bundle.open(bundle_copy)


def test_runtime_verifies_an_opened_bundle_anew_if_asked_to(bundle_copy: Path) -> None:
    opened = Bundle.open(bundle_copy)
    flip_the_middle(a_blob(bundle_copy))
    Runtime(opened).close()
    for bundle in (opened, bundle_copy):
        with pytest.raises(IntegrityError, match="differ from the manifest"):
            Runtime(bundle, verify="full")
    with pytest.raises(UsageError, match="'quick' or 'full'"):
        Runtime(bundle_copy, verify="fast")


# --- files that are listed truthfully and hostile all the same ------------------------------------------------------------

HOSTILE: dict[str, tuple[str, bytes]] = {
    "graph of zeros": ("base.cpu.onnx", bytes(100)),
    "empty graph": ("base.cpu.onnx", b""),
    "graph of text": ("base.cpu.onnx", b"#!/bin/sh\nrm -rf /\n"),
    "tokenizer of zeros": ("tokenizer.json", bytes(100)),
    "empty tokenizer": ("tokenizer.json", b""),
    "tokenizer list": ("tokenizer.json", b"[]"),
    "tokenizer deep": ("tokenizer.json", b"[" * 100_000),
    "tokenizer not UTF-8": ("tokenizer.json", b"\xff\xfe{}"),
    "tokenizer config list": ("tokenizer_config.json", b"[1, 2]"),
    "tokenizer config null": ("tokenizer_config.json", b"null"),
    "tokenizer config cut": ("tokenizer_config.json", b'{"bos_token": "<s>'),
    "tokenizer config surrogate": ("tokenizer_config.json", rb'{"bos_token": "\ud800"}'),
    "tokenizer config deep": ("tokenizer_config.json", b'{"a":' * 100_000),
    "tokenizer config not UTF-8": ("tokenizer_config.json", b"\xff\xff"),
    "adapter of zeros": ("plain.adapter.safetensors", bytes(100)),
    "empty adapter": ("plain.adapter.safetensors", b""),
    "adapter with a huge header": ("plain.adapter.safetensors", b"\xff" * 8 + b"{}"),
    "pickled adapter": ("plain.adapter.safetensors", b"\x80\x04\x95cos\nsystem\n."),
}


@pytest.mark.parametrize(("name", "raw"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_file_is_refused_with_a_typed_error(bundle_copy: Path, name: str, raw: bytes) -> None:
    replace(bundle_copy, name, raw)
    with pytest.raises(IntegrityError), Runtime(bundle_copy) as runtime:
        runtime.switch("base")
        runtime.switch("plain-live")


def adapter_bytes(**changes: Any) -> bytes:
    import numpy as np
    from safetensors.numpy import save

    return save({name: np.asarray(value) for name, value in changes.items()})


def test_adapters_of_other_shapes_and_types_are_refused(bundle_copy: Path) -> None:
    import numpy as np

    module = "model.layers.0.self_attn.q_proj"
    for a, b in (
        (np.zeros((4, 64), np.float32), np.zeros((64, 4), np.float16)),
        (np.zeros((4, 63), np.float16), np.zeros((64, 4), np.float16)),
        (np.zeros((4, 64), np.float16), np.zeros((63, 4), np.float16)),
        (np.zeros((4, 64), np.float16), np.zeros((64, 5), np.float16)),
        (np.zeros((4, 64, 1), np.float16), np.zeros((64, 4), np.float16)),
    ):
        replace(bundle_copy, "plain.adapter.safetensors", adapter_bytes(**{f"{module}.lora_A": a, f"{module}.lora_B": b}))
        with Runtime(bundle_copy) as runtime, pytest.raises(IntegrityError):
            runtime.switch("plain-live")


def test_an_adapter_with_only_one_factor_is_refused(bundle_copy: Path) -> None:
    import numpy as np

    one = {"model.layers.0.self_attn.q_proj.lora_A": np.zeros((4, 64), np.float16)}
    replace(bundle_copy, "plain.adapter.safetensors", adapter_bytes(**one))
    with Runtime(bundle_copy) as runtime, pytest.raises(IntegrityError):
        runtime.switch("plain-live")


BROKEN_TEMPLATES = {
    "unclosed": (b"{% for m in messages %}\n{{ m }}", "line 2"),
    "unknown tag": (b"a\n{% nothing %}", "line 2.*nothing"),
    "unknown filter": (b"{{ messages | nothing }}", "line 1.*nothing"),
    "not UTF-8": (b"ab\xff", "not UTF-8"),
    "deep": (b"{{" + b"(" * 5000 + b"1" + b")" * 5000 + b"}}", "not a valid template"),
    "too large": (b"x" * ((1 << 18) + 1), "262145 bytes"),
}


@pytest.mark.parametrize(("raw", "said"), BROKEN_TEMPLATES.values(), ids=BROKEN_TEMPLATES.keys())
def test_a_broken_chat_template_keeps_no_bundle_from_opening(bundle_copy: Path, raw: bytes, said: str) -> None:
    replace(bundle_copy, "chat_template.jinja", raw)
    with Runtime(bundle_copy) as runtime:
        assert len(runtime.generate("the cat", max_tokens=3, ignore_eos=True).tokens) == 3
        with pytest.raises(IntegrityError, match=said) as raised:
            runtime.generate([{"role": "user", "content": "hi"}])
        assert "\n" not in str(raised.value)


MODEL_LIES = {
    "other head size": ("head_size", 32),
    "more key/value heads": ("kv_heads", 4),
    "fewer key/value heads": ("kv_heads", 1),
    "more layers": ("layers", 3),
    "fewer layers": ("layers", 1),
    "countless layers": ("layers", 1 << 52),
    "larger vocabulary": ("vocab_size", 301),
    "smaller vocabulary": ("vocab_size", 299),
    "context beyond the rotary tables": ("context_length", 1100),
}


@pytest.mark.parametrize(("key", "number"), MODEL_LIES.values(), ids=MODEL_LIES.keys())
def test_manifest_that_lies_about_the_graph_is_refused(bundle_copy: Path, key: str, number: int) -> None:
    value = read(bundle_copy)
    value["model"][key] = number
    write(bundle_copy, value)
    with pytest.raises(IntegrityError), Runtime(bundle_copy) as runtime:
        runtime.logits([5] * min(1050, value["model"]["context_length"]), variant="base")


@pytest.mark.parametrize("name", [".DS_Store", "._bundle.json", "Thumbs.db", "desktop.ini", ".directory"])
def test_what_a_file_manager_leaves_is_no_part_of_a_bundle(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).write_bytes(b"x")
    opened = Bundle.open(bundle_copy, verify="full")
    assert name not in describe_files(bundle_copy)
    assert name not in opened.manifest.files


SLOT_LIES = {
    "input that is not there": ("a", "nothing"),
    "input of the model": ("a", "input_ids"),
    "other modules": ("modules", ["x", "y", "z"]),
    "other columns": ("columns", 1 << 50),
    "other rows": ("rows", [1 << 50] * 3),
    "twice the columns": ("columns", 128),
    "twice the rows": ("rows", [128] * 3),
    "columns of another age": ("columns", 1 << 70),
    "rows of another age": ("rows", [64, 1 << 31, 64]),
    "no rows": ("rows", [64, 0, 64]),
}


@pytest.mark.parametrize("kernels", ["auto", "onnxruntime"])
@pytest.mark.parametrize(("key", "lie"), SLOT_LIES.values(), ids=SLOT_LIES.keys())
def test_live_slots_that_lie_about_the_graph_are_refused(bundle_copy: Path, key: str, lie: Any, kernels: str) -> None:
    value = read(bundle_copy)
    value["live_slots"][0][key] = lie
    write(bundle_copy, value)
    with pytest.raises(IntegrityError), Runtime(bundle_copy, kernels=kernels) as runtime:
        runtime.logits([5, 6], variant="plain-live")


@pytest.mark.parametrize("kernels", ["auto", "onnxruntime"])
def test_live_slots_in_another_order_are_refused_or_without_effect(bundle_copy: Path, kernels: str) -> None:
    with Runtime(bundle_copy, kernels=kernels) as runtime:
        honest = runtime.logits([5, 6], variant="plain-live")
    value = read(bundle_copy)
    value["live_slots"].reverse()
    write(bundle_copy, value)
    with Runtime(bundle_copy, kernels=kernels) as runtime:
        if runtime.kernels != "onnxruntime":  # edgelora's kernels find a slot by its position
            with pytest.raises(IntegrityError, match="in the same order"):
                runtime.logits([5, 6], variant="plain-live")
        else:
            assert (runtime.logits([5, 6], variant="plain-live") == honest).all()


def test_slots_of_more_modules_than_kernels_take_are_refused(bundle_copy: Path) -> None:
    value = read(bundle_copy)
    slots = value["live_slots"][0]
    for key in ("modules", "rows", "b"):
        slots[key] += [slots[key][0]]
    write(bundle_copy, value)
    with Runtime(bundle_copy) as runtime, pytest.raises(IntegrityError):
        runtime.logits([5, 6], variant="plain-live")


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "sub/x.bin", "unlisted.bin"])
def test_graph_that_maps_a_file_outside_the_manifest_is_refused(bundle_copy: Path, location: str) -> None:
    import onnx

    model = onnx.load(bundle_copy / "base.cpu.onnx", load_external_data=False)
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    (bundle_copy.parent / "secret.bin").write_bytes(bytes(1 << 20))
    for entry in external[0].external_data:
        if entry.key == "location":
            entry.value = location
    replace(bundle_copy, "base.cpu.onnx", model.SerializeToString())
    with pytest.raises(IntegrityError), Runtime(bundle_copy) as runtime:
        runtime.switch("base")
