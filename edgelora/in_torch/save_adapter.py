"""Writes a trained adapter as a PEFT folder, and keeps it somewhere if that fails."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.adapters.folder import WEIGHTS, write_provenance
from edgelora.in_torch.adapter_start import START, join_start
from edgelora.in_torch.run.checkpoints import save_weights
from edgelora_export.weights.torch_model import quiet_libraries
from edgelora_runtime.errors import InputError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgelora.adapters.folder import Provenance

_LARGEST_FP16 = 65504.0
_ROOM = 1 << 20  # bytes, for the adapter's small files


def check_room(model: Any, folder: Path) -> None:
    """Raises ResourceError if the disk of a folder lacks the room for the adapter that is about to be trained."""
    needed = _ROOM + sum(4 * parameter.numel() for _, parameter in _factors(model))  # 4: what does not fit fp16 is saved in fp32
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(f"the adapter needs {needed >> 20} MiB, but the disk of {folder.parent} has {free >> 20}; free some")


def check_factors(model: Any) -> None:
    """Raises InputError if training left a factor that is not finite."""
    for name, parameter in _factors(model):
        if not bool(parameter.isfinite().all()):
            raise InputError(f"training diverged: {name} is not finite; lower --lr or check the rows")


def save_adapter(model: Any, folder: Path) -> None:
    """Writes PEFT's two files, with factors in fp16, or in fp32 if a number is too large for that.

    An adapter that subtracts its start is joined with it, in fp32, as fp16 would round away what is left of the two.
    Deletes PEFT's model card, which is an empty template.
    """
    import torch

    if START in model.peft_config:
        tensors, config = join_start(model)
        save_weights({name: tensor.float().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        config.inference_mode = True
        config.save_pretrained(folder)
        return
    factors = list(_factors(model))
    fits = all(float(parameter.abs().max()) <= _LARGEST_FP16 for _, parameter in factors)
    for _, parameter in factors:
        parameter.data = parameter.data.to(torch.float16 if fits else torch.float32)
    model.save_pretrained(folder, selected_adapters=["default"])  # beside it, preferences keep what they compare with
    (folder / "README.md").unlink(missing_ok=True)


def keep_adapter(model: Any, output: Path, provenance: Provenance | None) -> str:
    """Saves an adapter that could not be written to `output`, beside it or in the folder for temporary files.

    Returns where it is, for the error's message.
    """
    for folder in _places(output):
        with contextlib.suppress(Exception), quiet_libraries(whole_process=False):
            folder.mkdir(parents=True)
            save_adapter(model, folder)
            with contextlib.suppress(Exception):
                if provenance is not None:
                    write_provenance(folder, provenance)
            return f"the trained adapter is kept in {folder}"
        shutil.rmtree(folder, ignore_errors=True)
    return "the trained adapter is lost, as no folder could be written"


def _places(output: Path) -> Iterator[Path]:
    beside = (output.with_name(f"{output.name}.kept{number}") for number in ("", *(f"-{count}" for count in range(2, 100))))
    yield from (path for path in (next((path for path in beside if not path.exists()), None),) if path is not None)
    with contextlib.suppress(OSError):
        yield Path(tempfile.mkdtemp(prefix=f"edgelora-{output.name}-")) / output.name


def _factors(model: Any) -> Iterator[tuple[str, Any]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_A.default" in name:  # frozen in a composable adapter
            yield name, parameter
