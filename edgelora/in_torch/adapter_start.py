"""Puts an adapter on a base that is loaded: a new one, with what its A and B start from, or one to go on with.

A start never changes the base. PiSSA and OLoRA take their first product out of the base's weights in the papers. Here a second,
frozen adapter subtracts it, so that the base stays what export reads, in 4 bits too. When the adapter is saved, both become one
plain LoRA adapter of twice the rank.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.adapters.folder import Adapter, read_provenance
from edgelora.adapters.kinds import base_init
from edgelora.adapters.orthogonal_slots import freeze_slot
from edgelora_export.base.files import read_json
from edgelora_export.weights.torch_model import first_line
from edgelora_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgelora.in_torch.train_config import TrainConfig
    from edgelora_export.base.base import Base

START = "start"  # the name of the frozen adapter that subtracts the first product
SUBTRACTED = ("pissa", "olora")  # starts whose first product is subtracted
_COMPOSABLE = "composable: slot "


def adopt_adapter(config: TrainConfig, base: Base) -> TrainConfig:
    """Returns the settings of a run that goes on with an adapter: its rank, alpha and kind in place of the config's.

    Without --from they are as they were. Raises InputError for an adapter of another base, or of a form that cannot go on.
    """
    if config.from_adapter is None:
        return config
    adapter, folder = Adapter.open(config.from_adapter), Path(config.from_adapter)
    if not (folder / "adapter_config.json").is_file():
        raise InputError(
            f"--from {folder} is no PEFT folder; convert it with edgelora compose --adapter {folder} --output FOLDER"
        )
    settings = read_json(folder / "adapter_config.json", "PEFT writes it")
    if base_init(settings) is not None:
        raise InputError(
            f"--from {folder}: its start {settings['init_lora_weights']} changed the base; save it as plain LoRA first"
        )
    origin = adapter.provenance
    if origin is not None and origin.base_sha256 != base.sha256:
        raise InputError(f"--from {folder} was trained on base {origin.base_name}, whose weights differ from {config.base}")
    slot = config.composable
    if origin is not None and origin.init.startswith(_COMPOSABLE):
        slot = int(origin.init.removeprefix(_COMPOSABLE))
    elif slot is not None:
        raise InputError(f"--from {folder} is not frozen to a slot, so --composable {slot} would change it; leave one out")
    saved = settings.get("modules_to_save")
    return replace(
        config,
        rank=int(settings["r"]),
        alpha=float(settings["lora_alpha"]),
        rslora=bool(settings.get("use_rslora")),
        dora=bool(settings.get("use_dora")),
        dropout=float(settings.get("lora_dropout") or 0.0),
        target_modules=None,
        modules_to_save=tuple(saved) if saved else None,
        composable=slot,
    )


def describe_start(config: TrainConfig) -> str:
    """Describes what A and B started from, for edgelora.json."""
    if config.composable is not None:
        return f"{_COMPOSABLE}{config.composable}"
    if config.from_adapter is not None:
        origin = read_provenance(Path(config.from_adapter))
        return f"from {Path(config.from_adapter).resolve().name}" + (f" ({origin.init})" if origin else "")
    return config.start


def add_adapter(config: TrainConfig, model: Any) -> Any:
    """Puts the adapter that a config asks for on a base, and returns PEFT's model.

    What only data or weights can tell is set later, see set_start. Raises InputError if PEFT cannot adapt the base.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if config.from_adapter is not None:
        adapted: Any = PeftModel.from_pretrained(model, config.from_adapter, is_trainable=True)
        return adapted
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT only divides it, so it may be a float
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules="all-linear" if config.target_modules is None else list(config.target_modules),
        modules_to_save=list(config.modules_to_save) if config.modules_to_save else None,
        ensure_weight_tying=bool(config.modules_to_save) and tied,
        **_start_settings(config.start),
    )
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:  # PEFT's for a base without layers that it can adapt
        raise InputError(f"no adapter can be put on base {config.base} ({first_line(error)})") from error
    if config.start in SUBTRACTED:
        adapted.add_adapter(START, lora)
        adapted.base_model.set_adapter(["default", START])
        for name, parameter in adapted.named_parameters():
            if f".{START}." in name:
                parameter.requires_grad_(requires_grad=False)
    return adapted


def _start_settings(start: str) -> dict[str, Any]:
    """Returns the fields of PEFT's config for the starts that are PEFT's own."""
    if start == "eva":
        from peft import EvaConfig

        return {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}  # 1: each layer keeps the rank that was asked for
    return {"init_lora_weights": "gaussian" if start == "gaussian" else True}


def set_start(config: TrainConfig, model: Any, base: Base, batches: Any) -> None:
    """Sets what A and B start from, on a model of add_adapter().

    batches: of the training rows, as the trainer collates them. EVA looks at them. Raises InputError if that is not enough.
    """
    if config.composable is not None:
        freeze_slot(model, config.composable)
    elif config.start == "eva":
        from peft import initialize_lora_eva_weights

        try:
            initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        except ValueError as error:
            raise InputError(
                f"start = eva failed ({first_line(error)}); give more rows, a lower rank or another start"
            ) from error
    elif config.start in (*SUBTRACTED, "loftq"):
        for name, layer in _list_layers(model):
            _start_layer(config.start, layer, base, name)


def list_own(model: Any) -> list[tuple[str, Any]]:
    """Lists an adapter's own parameters with their names: what training changes, and the frozen factors of its start."""
    return [(name, each) for name, each in model.named_parameters() if each.requires_grad or f".{START}." in name]


def _list_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yields the adapted linear layers with their names in the base."""
    for name, module in model.named_modules():
        if len(getattr(module, "lora_A", ())):
            yield name.removeprefix("base_model.model."), module


def _start_layer(start: str, layer: Any, base: Base, name: str) -> None:
    """Sets A and B of one layer from its weight.

    pissa: its best approximation of the rank (arXiv 2404.02948). olora: the first columns of Q and rows of R (arXiv 2406.01775).
    loftq: the best approximation of what the base lost when it was quantized (arXiv 2310.08659, one iteration).
    """
    import torch
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    inner = layer.get_base_layer()
    weight = dequantize_module_weight(inner).detach().float()
    weight = weight.T if isinstance(inner, Conv1D) else weight
    rank, scale = layer.r["default"], layer.scaling["default"]
    if start == "loftq":
        weight = torch.from_numpy(base.tensor(f"{name}.weight")).to(weight).reshape(weight.shape) - weight
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        first, second = q[:, :rank], r[:rank]
    else:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        root = (s[:rank] / scale).sqrt()
        first, second = u[:, :rank] * root, root[:, None] * v[:rank]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(second)
        layer.lora_B["default"].weight.copy_(first)
        if start in SUBTRACTED:
            layer.lora_A[START].weight.copy_(second)
            layer.lora_B[START].weight.copy_(-first)


def join_start(model: Any) -> tuple[dict[str, Any], Any]:
    """Joins the trained adapter and the frozen one that subtracts its start into one plain LoRA adapter of twice the rank.

    Returns its tensors, by PEFT's names, and PEFT's config. [B, -B₀]·[A; A₀] = BA - B₀A₀, and the scale stays the same.
    """
    import copy
    import math

    import torch
    from peft.utils import get_peft_model_state_dict

    trained, first = (get_peft_model_state_dict(model, adapter_name=name) for name in ("default", START))
    joined = {
        name: torch.cat([tensor, first[name]], dim=0 if "lora_A" in name or "lora_embedding_A" in name else 1)
        if "lora_" in name
        else tensor
        for name, tensor in trained.items()
    }
    config = copy.copy(model.peft_config["default"])
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    return joined, config
