"""A bundle on disk, with checks of its files.

Names, kinds, sizes and graphs are checked when it opens, every byte on verify().
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelora_runtime.arguments import check_path, show
from edgelora_runtime.bundle.graphs.check import check_graphs
from edgelora_runtime.bundle.graphs.wire import GraphError
from edgelora_runtime.bundle.manifest import MANIFEST, MANIFEST_LIMIT, Manifest, parse_manifest
from edgelora_runtime.errors import InputError, IntegrityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_CHUNK = 1 << 20  # bytes hashed at a time
VERIFY = ("quick", "full")
_SYSTEM_FILES = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", ".directory"})  # of macOS, Windows and KDE
TEXT_LIMIT = 64 << 20  # bytes; a tokenizer.json of 256k entries takes about 30 MB


@dataclass(frozen=True, repr=False)
class Bundle:
    """An opened bundle, with its folder and its manifest."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path | str, *, verify: str = "quick", on_file: Callable[[str], None] | None = None) -> Bundle:
        """Reads the manifest and checks the folder against it.

        Besides what file managers leave, the folder must hold exactly the files that the manifest lists, with their sizes, and
        graphs that export could have written. verify: "full" hashes every file as well, which reads the whole bundle, and calls
        on_file with the name of each.
        Raises InputError if there is no bundle, IntegrityError if it differs from its manifest.
        """
        folder = check_path("Bundle.open", "folder", folder)
        if not isinstance(verify, str) or verify not in VERIFY:
            raise UsageError(f"Bundle.open: verify = {show(verify)}: use {' or '.join(map(repr, VERIFY))}")
        try:
            is_folder, has_manifest = folder.is_dir(), (folder / MANIFEST).is_file()
        except OSError as error:  # a name that is too long, a folder that others may not look into
            raise InputError(f"no bundle at {show(str(folder))}: {error.strerror}") from None
        if not is_folder:
            raise InputError(f"no bundle at {folder}: not a folder; make one with: edgelora export RECIPE.toml --output {folder}")
        if not has_manifest:
            raise InputError(f"no bundle at {folder}: it has no {MANIFEST}; make one with: edgelora export")
        manifest = parse_manifest(_read_regular(folder / MANIFEST, MANIFEST_LIMIT))
        wrong = _compare(folder, manifest)
        if wrong:
            raise IntegrityError(f"bundle {folder}: {'; '.join(wrong[:8])}{' …' if len(wrong) > 8 else ''}")
        bundle = cls(folder, manifest)
        if verify == "full" and (broken := bundle.verify(on_file)):
            raise IntegrityError(
                f"bundle {folder}: {', '.join(broken)} differ from the manifest; copy or export the bundle again"
            )
        bundle._check_graphs()
        return bundle

    def __repr__(self) -> str:
        model, variants, adapters = self.manifest.model, self.manifest.variants, self.manifest.adapters
        return (
            f"<Bundle {str(self.folder)!r}: {model.architecture} of {model.layers} layers, {len(variants)} variants, "
            f"{len(adapters)} adapters>"
        )

    def verify(self, on_file: Callable[[str], None] | None = None) -> list[str]:
        """Hashes every file. Returns the names of those that differ from the manifest."""
        if on_file is not None and not callable(on_file):
            raise UsageError(f"Bundle.verify: on_file = {show(on_file)}: use a function of a file's name, or None")
        broken = []
        for name, entry in self.manifest.files.items():
            if hash_file(self.folder / name) != entry.sha256:
                broken.append(name)
            if on_file is not None:
                on_file(name)
        return broken

    def _check_graphs(self) -> None:
        try:
            check_graphs(self.manifest, lambda name, limit: self.read(name, limit=limit))
        except GraphError as error:
            raise IntegrityError(f"bundle {self.folder}: {error}") from None

    def path(self, name: str) -> Path:
        """Returns the path of a listed file."""
        if not isinstance(name, str):
            raise UsageError(f"Bundle: name = {show(name)}: use the name of a file of the bundle")
        if name not in self.manifest.files:
            raise IntegrityError(f"bundle {self.folder} lists no file {show(name)}")
        return self.folder / name

    def read(self, name: str, *, limit: int = TEXT_LIMIT) -> bytes:
        """Reads a listed file and checks its hash.

        For small files that the runtime parses.
        """
        raw = _read_regular(self.path(name), limit)
        if hashlib.sha256(raw).hexdigest() != self.manifest.files[name].sha256:
            raise IntegrityError(f"bundle {self.folder}: {name} is not the file that {MANIFEST} lists; copy the bundle again")
        return raw

    def has(self, name: str) -> bool:
        return isinstance(name, str) and name in self.manifest.files


def take_bundle(bundle: Bundle | Path | str, verify: str) -> Bundle:
    """Opens a bundle, or returns an opened one as it is. verify: as in Bundle.open. "full" opens in any case."""
    if isinstance(bundle, Bundle):
        return bundle if verify == "quick" else Bundle.open(bundle.folder, verify=verify)
    return Bundle.open(bundle, verify=verify)


def is_left_by_system(name: str) -> bool:
    """True for files that a system's file manager puts into any folder by itself, such as .DS_Store. Nothing reads them."""
    return name in _SYSTEM_FILES or name.startswith("._")


def is_empty(folder: Path) -> bool:
    """True if a folder holds nothing besides what a system's file manager put there."""
    return all(is_left_by_system(entry.name) for entry in folder.iterdir())


def _compare(folder: Path, manifest: Manifest) -> list[str]:
    """Returns one message per file that is missing, unlisted, of another size, or not a plain file."""
    wrong: list[str] = []
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in entries if not is_left_by_system(entry.name)}
    for name, entry in manifest.files.items():
        info = found.pop(name, None)
        if info is None:
            wrong.append(f"{name} is missing")
        elif not stat.S_ISREG(info.st_mode):
            wrong.append(f"{name} is not a plain file")
        elif info.st_size != entry.size:
            wrong.append(f"{name} has {info.st_size} bytes, not {entry.size}")
    found.pop(MANIFEST, None)
    wrong += [f"{name} is not listed in {MANIFEST}" for name in sorted(found)]
    return wrong


def _open_regular(path: Path) -> int:
    """Opens a plain file, without following links."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise IntegrityError(f"{path} cannot be opened as a plain file ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IntegrityError(f"{path} is not a plain file")
    return descriptor


def _read_regular(path: Path, limit: int) -> bytes:
    with os.fdopen(_open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(size + 1) if size <= limit else b""  # read() takes memory for as many bytes as it is asked for
    if max(size, len(raw)) > limit:
        raise IntegrityError(f"{path} is larger than {limit} bytes, the limit for such a file")
    return raw


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a plain file, in hex."""
    digest = hashlib.sha256()
    with os.fdopen(_open_regular(path), "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
