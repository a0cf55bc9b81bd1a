"""Says what kind of model a folder holds, and refuses every kind that is no decoder-only language model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from edgelora_export.architectures import native_types
from edgelora_export.base.files import read_json
from edgelora_export.base.safetensors_folder import list_files
from edgelora_export.base.text_part import WRAPPERS, is_multimodal
from edgelora_runtime.errors import InputError, make_printable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# The ends of class names that save a causal language model, as transformers names them.
_CAUSAL = re.compile(r"ForCausalLM$|LMHeadModel$|LMHead$")
_WRAPPER_CLASS = "ForConditionalGeneration"
# What a model of another class is, by a part of the class's name. The first that matches holds.
_OTHERS = (
    (re.compile(r"For\w*(Classification|Reward)|Reward\w*Model$"), "a classifier, whose head gives labels or scores"),
    (re.compile(r"For(MaskedLM|QuestionAnswering|MultipleChoice|NextSentencePrediction|PreTraining)$"), "an encoder"),
    (re.compile(r"For(CTC|RNNT|TDT|Audio|XVector|Speech|TextTo(Spectrogram|Waveform))"), "a speech or audio model"),
    (re.compile(r"For(Image|Object|Semantic|Instance|Universal|Depth|Video|ZeroShot|Keypoint|Mask)"), "a vision model"),
    (re.compile(rf"{_WRAPPER_CLASS}$"), "a sequence-to-sequence model or a multimodal one"),
    (re.compile(r"Model$"), "a model without a language head, as encoders and embedding models are"),
)


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a folder. Raises InputError, with what the folder is instead, if it holds no whole model."""
    if (folder / ADAPTER_CONFIG).is_file():
        made_for = read_json(folder / ADAPTER_CONFIG, "an adapter has it").get("base_model_name_or_path")
        origin = f" {make_printable(made_for)!r}" if isinstance(made_for, str) and made_for else ""
        if not (folder / CONFIG).is_file():
            raise InputError(f"base {folder} is an adapter; give its base{origin} as the base, and this folder as an adapter")
        raise InputError(f"base {folder} holds an adapter ({ADAPTER_CONFIG}) beside a model; move one of them to its own folder")
    if not (folder / CONFIG).is_file() and (held := list_files(folder, ("*.gguf",))):
        raise InputError(f"base {folder} holds GGUF files ({held}); give the path of one of them")
    return read_json(folder / CONFIG, "a base needs it")


def check_kind(config: Mapping[str, Any], where: str) -> None:
    """Checks that a config.json describes a model that edgelora takes: natively, its text part, or through Optimum.

    where: the base, for the message. Raises InputError, with what the model is and what to take instead.
    """
    kind, name = config.get("model_type"), _read_class(config)
    if not isinstance(kind, str):
        raise InputError(f"base {where}: {CONFIG} names no model_type; save the model with transformers' save_pretrained")
    kind = make_printable(kind, 60)
    if kind in WRAPPERS and (not name or name.endswith(_WRAPPER_CLASS)):
        return
    if is_multimodal(config) and kind not in WRAPPERS:
        raise InputError(
            f"base {where} is a multimodal model ({name or kind}), and its text part has no model of its own that is known to "
            f"compute the same; those of {', '.join(sorted(WRAPPERS))} are taken"
        )
    if config.get("is_encoder_decoder"):
        raise _refuse(config, where, f"a sequence-to-sequence model ({name or kind})")
    if name and not _CAUSAL.search(name):
        for pattern, what in _OTHERS:
            if pattern.search(name):
                raise _refuse(config, where, f"{what} ({name})")
    if kind not in native_types():
        _check_known(config, kind, where)


def _check_known(config: Mapping[str, Any], kind: str, where: str) -> None:
    """Checks that transformers knows a type as a causal language model, so that Optimum may export it."""
    try:
        from transformers import __version__
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        )
    except ImportError:
        return  # the export that needs it names its extra
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own_code = " and needs code of its own (auto_map), which is never run" if "auto_map" in config else ""
        raise InputError(
            f"base {where}: model_type {kind!r} is no language model that transformers {__version__} knows{own_code}; these have "
            f"a native graph: {', '.join(native_types())}"
        )
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not _read_class(config) and not config.get("is_decoder"):
        raise _refuse(config, where, f"an encoder ({kind})")


def _refuse(config: Mapping[str, Any], where: str, what: str) -> InputError:
    origin = config.get("_name_or_path")
    known = isinstance(origin, str) and _HUB_ID.fullmatch(origin) and not where.endswith(origin)
    made_from = f", or the model that it was made from ({origin}) if that is one" if known else ""
    return InputError(f"base {where} is {what}; give a decoder-only language model, a …ForCausalLM{made_from}")


def _read_class(config: Mapping[str, Any]) -> str:
    """Returns the name of the class that saved the model, "" if the config does not say."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else ""
    return make_printable(first, 80) if isinstance(first, str) else ""
