"""Loads a whole base into transformers, for tools that run it in torch: training, search, Optimum and auto-round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from edgelora_export.base.quiet import first_line as first_line
from edgelora_export.base.quiet import quiet_libraries as quiet_libraries
from edgelora_export.base.safetensors_folder import SafetensorsFolder
from edgelora_export.base.texts import as_folder
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from edgelora_export.base.base import Base
    from edgelora_export.base.tensors import Tensors

GENERATION_CONFIG = "generation_config.json"


def load_model(base: Base, *, dtype: Any = None, quantization_config: Any = None, device_map: Any = None) -> Any:
    """Loads the base as transformers does, for all tools that run it in torch.

    dtype: a torch dtype, None for float32. quantization_config: of transformers, such as NF4's. device_map: as transformers takes
    it, None for the CPU without accelerate.
    A plain folder is loaded by its path. Of any other base, such as the text part of a wrapper, transformers gets the config and
    the tensors, one at a time as it asks for them.
    Raises InputError if transformers cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    settings = {
        "dtype": torch.float32 if dtype is None else dtype,
        "quantization_config": quantization_config,
        "device_map": device_map,
    }
    try:
        if isinstance(base.tensors, SafetensorsFolder):
            model: Any = AutoModelForCausalLM.from_pretrained(base.path, local_files_only=True, **settings)
        else:
            model = _load_tensors(base, settings)
    except (InputError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # RuntimeError: tensors of other shapes than the config's
        raise InputError(f"transformers cannot load base {base.path} ({first_line(error)})") from error
    return model.eval()


def _load_tensors(base: Base, settings: Mapping[str, Any]) -> Any:
    """Loads a base whose config or tensors are not those of its folder.

    Generation settings come from its texts. transformers warns of tensors that the config does not use, as for a folder.
    """
    import transformers
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    models: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    config: Any = CONFIG_MAPPING[base.config["model_type"]].from_dict(base.config)
    tensors = {name: _LazyTensor(base.tensors, name) for name in base.tensors.files}
    lazy = int(transformers.__version__.partition(".")[0]) >= 5
    state = tensors if lazy else {name: tensor[...] for name, tensor in tensors.items()}
    model = models[type(config)].from_pretrained(None, config=config, state_dict=state, **settings)
    model.name_or_path = model.config.name_or_path = str(base.path)  # PEFT writes it into an adapter's config
    if GENERATION_CONFIG in base.texts:
        with as_folder(base.texts) as folder:
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


class _LazyTensor:
    """A tensor that is read when transformers takes all of it with [...], as it does with a file's slices.

    https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/core_model_loading.py, _materialize_copy
    """

    def __init__(self, tensors: Tensors, name: str) -> None:
        self._tensors, self._name = tensors, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        import torch

        values = np.ascontiguousarray(self._tensors.read(self._name))
        if values.dtype == ml_dtypes.bfloat16:  # torch knows none of ml_dtypes' types
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)[index]
        return torch.from_numpy(values)[index]
