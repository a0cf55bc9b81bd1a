"""The texts of a base: its configs, its tokenizer and its chat templates, by file name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")
_NOT_TEXTS = ".safetensors.index.json"


class TextsOfFolder(Mapping[str, bytes]):
    """The texts of a folder in the Hugging Face layout, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> bytes:
        path = self.folder / name
        if name not in set(self):
            raise KeyError(name)
        return path.read_bytes()

    def __iter__(self) -> Iterator[str]:
        found = {path.relative_to(self.folder).as_posix() for pattern in _PATTERNS for path in self.folder.glob(pattern)}
        return iter(sorted(name for name in found if not name.endswith(_NOT_TEXTS)))

    def __len__(self) -> int:
        return len(list(iter(self)))


@contextmanager
def as_folder(texts: Mapping[str, bytes]) -> Iterator[Path]:
    """Gives a folder with these files, from which transformers can load a tokenizer. It may vanish afterwards."""
    if isinstance(texts, TextsOfFolder):
        yield texts.folder
        return
    with TemporaryDirectory(prefix="edgelora-") as folder:
        for name, content in texts.items():
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        yield Path(folder)
