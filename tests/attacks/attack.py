"""The shape of an attack: a hostile input, made in an empty folder, and what a user does with it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelora_runtime.bundle.manifest import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True)
class Attack:
    """One hostile input.

    part: the kind of file. name: of the input, unique in its part. make: writes the input into a folder. open: does with that
    folder what a user would do, and should raise an error of edgelora's.
    """

    part: str
    name: str
    make: Callable[[Path], object]
    open: Callable[[Path], None]

    @property
    def label(self) -> str:
        return f"{self.part}: {self.name}"


class Copy:
    """A copy of a bundle that an attack may change. Its files are links to the bundle's until they are replaced."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for path in bundle.iterdir():
            if path.name == MANIFEST or not self._link(path):
                shutil.copyfile(path, folder / path.name)

    def _link(self, path: Path) -> bool:
        with contextlib.suppress(OSError):  # another disk
            os.link(path, self.folder / path.name)
            return True
        return False

    def read_manifest(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.folder / MANIFEST).read_bytes())
        return value

    def write_manifest(self, value: Any) -> None:
        self.write_raw(MANIFEST, json.dumps(value).encode())

    def write_raw(self, name: str, raw: bytes) -> None:
        """Replaces a file. The manifest stays as it is."""
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).write_bytes(raw)

    def replace(self, name: str, raw: bytes) -> None:
        """Replaces a file and its entry in the manifest, as an attacker does who makes the whole bundle."""
        self.write_raw(name, raw)
        value = self.read_manifest()
        value["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        self.write_manifest(value)


def make_copy(bundle: Path, change: Callable[[Copy], None]) -> Callable[[Path], None]:
    """Makes an attack's `make` of a change to a copy of a bundle."""

    def make(folder: Path) -> None:
        change(Copy(bundle, folder / "bundle"))

    return make


def open_bundle(folder: Path) -> None:
    """Opens a bundle, as every verb does."""
    from edgelora_runtime import Bundle

    Bundle.open(folder / "bundle")


def use_bundle(folder: Path) -> None:
    """Opens a bundle and answers a chat and a plain prompt with each variant, which reads every kind of file."""
    from edgelora_runtime import Runtime

    with Runtime(folder / "bundle", threads=1) as runtime:
        for variant in runtime.variants:
            runtime.generate("a" * 40 + " the cat!", variant=variant, max_tokens=3)
            runtime.generate([{"role": "user", "content": "hi"}], variant=variant, max_tokens=3)
