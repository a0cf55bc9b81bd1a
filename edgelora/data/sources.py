"""Finds the files of training data: one file, a folder of them, a data set on disk, or one in the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

TRAIN, TEST = ("train",), ("test", "validation")  # the splits of a folder that training reads, and that an evaluation reads
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # as save_to_disk of datasets names them
_DESCRIPTIONS = (SAVED, SAVED_SPLITS, "dataset_info.json", "dataset_infos.json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Words in names of files and folders, as datasets reads them:
# https://huggingface.co/docs/hub/datasets-file-names-and-splits
_SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


def find_data(name: Path | str) -> Path:
    """Finds a file or folder of data, or the folder of a data set in the hub's cache. Nothing is downloaded.

    Raises InputError if there is none.
    """
    path = Path(name)
    if path.exists():
        return path
    text = path.as_posix()
    if _HUB_ID.fullmatch(text) and not text.startswith(".") and _suffix(path) not in SUFFIXES:
        if found := _find_cached(text):
            return found
        raise InputError(
            f"data file {name} does not exist, and the hub's cache has no data set of that name; give an existing file, or fetch "
            f"the data set with: hf download --repo-type dataset {text}"
        )
    raise InputError(f"data file {name} does not exist; give an existing file")


def list_files(path: Path, splits: Sequence[str] = TRAIN) -> list[Path]:
    """Lists the files of data in a file or folder, by name. Of a data set that was saved to disk, its Arrow files.

    Where names of files or folders say which split they hold, only the first of these splits that there is counts. Raises
    InputError for a folder without data, or without these splits.
    """
    if not path.is_dir():
        return [path]
    if (path / SAVED_SPLITS).is_file():
        return list_files(_pick_saved(path, splits), splits)
    if (path / SAVED).is_file():
        return sorted(path.glob("*.arrow"))
    found = [each for each in sorted(path.rglob("*")) if each.is_file() and _is_data(each.relative_to(path))]
    tables = [each for each in found if _suffix(each) != ".txt"]  # beside tables, texts are notes and licences
    found = tables or found
    if not found:
        raise InputError(f"data folder {path} holds no file of data ({', '.join(SUFFIXES)})")
    named = {each: split for each in found if (split := _find_split(each.relative_to(path)))}
    if not named:
        return found
    for split in splits:
        if chosen := [each for each in found if named.get(each) == split]:
            return chosen
    raise InputError(
        f"data folder {path} has the splits {', '.join(sorted(set(named.values())))}, and none named {' or '.join(splits)}; "
        "give one of its files"
    )


def is_saved(path: Path) -> bool:
    """True for a folder that save_to_disk of datasets wrote."""
    return (path / SAVED).is_file() or (path / SAVED_SPLITS).is_file()


def _pick_saved(path: Path, splits: Sequence[str]) -> Path:
    """Picks the folder of a split among those of a DatasetDict that was saved to disk."""
    there = sorted(each.name for each in path.iterdir() if (each / SAVED).is_file())
    for split in splits:
        if split in there:
            return path / split
    raise InputError(
        f"data set {path} has the splits {', '.join(there) or 'none'}, and none named {' or '.join(splits)}; "
        "give the folder of one"
    )


def _find_cached(name: str) -> Path | None:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:  # comes with the extras; without them there is no such cache
        return None
    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _is_data(path: Path) -> bool:
    """True for a file, by its path inside the folder, that can hold rows."""
    if any(part.startswith((".", "_")) for part in path.parts):
        return False
    return _suffix(path) in SUFFIXES and path.name not in _DESCRIPTIONS


def _suffix(path: Path) -> str:
    """Returns what a file's name ends in, apart from .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _find_split(path: Path) -> str | None:
    """Returns the split that a file's name says, or that of a folder above it."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None
