"""Checkpoints of a training run: folders beside its output, each written whole or not at all.

`OUTPUT.checkpoints/step-40` holds what the trainer needs to go on exactly: weights, optimizer, schedule, random generators and
history, and run.json with the settings and hashes that a resumed run must share.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgelora.in_torch.adapter_start import list_own
from edgelora_export.base.files import read_json
from edgelora_export.weights.torch_model import first_line
from edgelora_runtime.errors import InputError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from edgelora.in_torch.train_config import TrainConfig

RUN, BEST = "run.json", "best.safetensors"
_WEIGHTS, _SAVING = "trainable.safetensors", ".saving"
_STEP = re.compile(r"step-(\d+)")
# Settings that may change between the parts of a run: they decide nothing about its numbers, or are compared by their hashes.
_FREE = ("base", "data", "output", "validation", "resume", "checkpoint_every", "checkpoint_minutes", "report_to", "log_every")


def locate_checkpoints(output: Path) -> Path:
    """Returns the folder of a run's checkpoints, which lies beside its output."""
    return output.with_name(f"{output.name}.checkpoints")


def find_last(folder: Path) -> Path | None:
    """Finds the latest checkpoint in a run's folder of them. Returns None if there is none."""
    steps = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and (path / RUN).is_file()]
    return max(steps, key=read_step, default=None)


def read_step(checkpoint: Path) -> int:
    """Returns the number of optimizer steps that a checkpoint has behind it."""
    match = _STEP.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def describe_run(config: TrainConfig, hashes: Mapping[str, str], processes: int) -> dict[str, Any]:
    """Describes what the parts of a run must share: settings, hashes of the files that they read, and the number of processes."""
    settings = {name: value for name, value in asdict(config).items() if name not in _FREE}
    share = config.validation if isinstance(config.validation, float) else None
    # Through JSON, as it is compared with a description that was read from a file.
    described: dict[str, Any] = json.loads(json.dumps({**settings, **hashes, "validation": share, "processes": processes}))
    return described


def find_checkpoint(config: TrainConfig, description: Mapping[str, Any]) -> Path | None:
    """Finds the checkpoint from which a run goes on. Returns None for a run that starts anew.

    Raises InputError if --resume finds none, or one of other settings or data, and if a run would start beside a checkpoint.
    """
    last = find_last(locate_checkpoints(config.output))
    if not config.resume:
        if last is not None:
            raise InputError(
                f"{last.parent} holds a checkpoint of step {read_step(last)}; add --resume to go on, or remove that folder"
            )
        return None
    if last is None:
        raise InputError(f"{locate_checkpoints(config.output)} holds no checkpoint; leave --resume out to start anew")
    stored = read_json(last / RUN, "train writes it")
    if differing := [
        f"{name} is {_show(description.get(name))}, was {_show(stored.get(name))}"
        for name in {**stored, **description}
        if stored.get(name) != description.get(name)
    ]:
        raise InputError(
            f"checkpoint {last} is of another run: {'; '.join(differing)}; give the same, or remove {last.parent} to start anew"
        )
    return last


def _show(value: object) -> str:
    """Shows a value of a description. Hashes are cut to what tells them apart."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


@contextmanager
def staged_checkpoint(folder: Path, step: int, description: Mapping[str, Any], *, first: bool) -> Iterator[Path]:
    """Yields a folder for the files of a checkpoint, which becomes folder/step-N if the block ends without an error.

    Older checkpoints are removed after that. first: False in the other processes of a run, which only add files. Raises
    ResourceError if something could not be written. The last checkpoint is then still whole.
    """
    staging, target = folder / _SAVING, folder / f"step-{step}"
    try:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True, exist_ok=True)
        yield staging
        if first:
            (staging / RUN).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
            for path in staging.rglob("*"):
                _flush(path)
            shutil.rmtree(target, ignore_errors=True)
            staging.rename(target)
            _flush(folder)
            for old in folder.glob("step-*"):
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        shutil.rmtree(staging, ignore_errors=True)
        last = find_last(folder)
        if last is None:
            remove_checkpoints(folder)
        kept = (
            "no earlier one is there" if last is None else f"that of step {read_step(last)} is whole, so --resume goes on from it"
        )
        raise ResourceError(
            f"the checkpoint of step {step} could not be written in {folder} ({first_line(error)}); free some space; {kept}"
        ) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def remove_checkpoints(folder: Path) -> None:
    """Removes the checkpoints of a run that has ended."""
    shutil.rmtree(folder, ignore_errors=True)


def take_weights(model: Any) -> dict[str, Any]:
    """Copies the tensors that training changes, by name, with those that a start keeps frozen beside them."""
    return {name: parameter.detach().to("cpu", copy=True).contiguous() for name, parameter in list_own(model)}


def put_weights(model: Any, weights: Mapping[str, Any]) -> None:
    """Copies tensors that take_weights() took back into a model."""
    import torch

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)


def save_weights(weights: Mapping[str, Any], path: Path) -> None:
    """Writes tensors by name."""
    from safetensors.torch import save_file

    save_file(dict(weights), path)


def load_weights(path: Path) -> dict[str, Any]:
    """Reads tensors by name."""
    from safetensors.torch import load_file

    return load_file(path)


def save_model_weights(model: Any, folder: Path) -> None:
    """Writes the trainable tensors of a model into a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(take_weights(model), folder / _WEIGHTS)


def load_model_weights(model: Any, folder: Path) -> None:
    """Reads the trainable tensors of a model from a checkpoint."""
    put_weights(model, load_weights(folder / _WEIGHTS))


def _flush(path: Path) -> None:
    """Flushes a file or a folder to disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
