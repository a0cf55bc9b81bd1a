"""The tensors of an adapter, as every kind of file gives them: by module and kind, in PEFT's shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes as ml_dtypes  # numpy knows bfloat16 only once this is imported
from safetensors import SafetensorError, safe_open

from edgelora_runtime.arguments import show
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from edgelora.adapters.provenance import Provenance

    Floats = NDArray[np.float32]
    Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


class AdapterTensors(Protocol):
    """The tensors of an adapter, one at a time.

    shapes: by module and kind (see edgelora.adapters.names). origins: a module's name in the model that it was trained in.
    """

    @property
    def shapes(self) -> Shapes: ...

    @property
    def origins(self) -> Mapping[str, str]: ...

    def read(self, module: str, kind: str) -> NDArray[Any]:
        """Reads a tensor in its own type, in the shape that `shapes` gives."""


_TYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class AdapterSource:
    """An adapter as a file or folder holds it.

    form: PEFT, MLX or GGUF. config: with the keys of PEFT's adapter_config.json. files: what its identity is hashed over.
    notes: what the user should know of it.
    """

    form: str
    config: Mapping[str, Any]
    tensors: AdapterTensors
    provenance: Provenance | None
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SafetensorsFactors:
    """The tensors of one safetensors file. Satisfies AdapterTensors.

    keys: the file's own names, by module and kind. transposed: True if the file holds matrices as (columns, rows).
    """

    path: Path
    keys: Mapping[str, Mapping[str, str]]
    shapes: Shapes
    origins: Mapping[str, str]
    transposed: bool = False

    def read(self, module: str, kind: str) -> NDArray[Any]:
        with safe_open(self.path, framework="numpy") as file:
            values: NDArray[Any] = file.get_tensor(self.keys[module][kind])
        return values.T if self.transposed else values


def read_file_shapes(path: Path, label: str) -> dict[str, tuple[int, ...]]:
    """Reads the shapes of a safetensors file's tensors. Raises InputError for a file that is absent or broken."""
    if not path.is_file():
        raise InputError(f"adapter {label}: {path} is missing; pickled adapters (.bin) are not supported, save it as safetensors")
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            odd = {key: part.get_dtype() for key, part in slices.items() if part.get_dtype() not in _TYPES}
    except (SafetensorError, OSError) as error:
        raise InputError(f"adapter {label}: {path} is not a readable safetensors file ({error})") from error
    if odd:
        key, kind = next(iter(odd.items()))
        raise InputError(f"adapter {label}: {show(key)} is of type {kind}; save the adapter in float32, float16 or bfloat16")
    return shapes
