"""A folder is named for what it is before a weight is read, and a config of any content gives one line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.auto import modeling_auto

from edgelora.in_torch.train import train
from edgelora.in_torch.train_config import TrainConfig
from edgelora_export.architectures import native_types, read_decoder
from edgelora_export.base.base import Base
from edgelora_export.base.kinds import check_kind
from edgelora_runtime.errors import EdgeloraError, InputError
from tests.tiny import make_base

if TYPE_CHECKING:
    from pathlib import Path

CLASSES = {
    "BertModel": "without a language head",
    "DistilBertForMaskedLM": "an encoder",
    "ElectraForPreTraining": "an encoder",
    "LlamaForTokenClassification": "a classifier",
    "Qwen2ForRewardModel": "a classifier",
    "Qwen2ForProcessRewardModel": "a classifier",
    "RobertaForQuestionAnswering": "an encoder",
    "Wav2Vec2ForCTC": "a speech or audio model",
    "SegformerForSemanticSegmentation": "a vision model",
    "PegasusForConditionalGeneration": "sequence-to-sequence",
    "NewModelForGuessing": "",
}


@pytest.mark.parametrize(("name", "what"), CLASSES.items())
def test_a_class_says_what_a_model_is(name: str, what: str) -> None:
    config = {"model_type": "llama", "architectures": [name], "_name_or_path": "some/origin"}
    if not what:  # an ending that no rule knows is left to the tensors
        check_kind(config, "base")
        return
    with pytest.raises(InputError, match=what) as raised:
        check_kind(config, "base")
    assert name in str(raised.value)
    assert "some/origin" in str(raised.value)


def test_every_causal_class_of_transformers_is_taken() -> None:
    """Some mappings of transformers name wrappers, encoder-decoders and bare models, which are other kinds."""
    for kind, name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            check_kind({"model_type": kind, "architectures": [name]}, "base")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_without_a_class_is_one_unless_it_is_a_decoder(kind: str) -> None:
    with pytest.raises(InputError, match="an encoder"):
        check_kind({"model_type": kind}, "base")
    check_kind({"model_type": kind, "is_decoder": True}, "base")


def test_what_a_config_says_is_printable() -> None:
    with pytest.raises(InputError) as raised:
        check_kind({"model_type": "x\x1b[31m\ny", "architectures": ["A\x07Model"]}, "base")
    assert str(raised.value).isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 4}
KEYS = [
    *SIZES, "head_dim", "num_key_value_heads", "max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta",
    "rms_norm_eps", "hidden_act", "layer_types", "sliding_window", "tie_word_embeddings", "partial_rotary_factor",
    "original_max_position_embeddings", "query_pre_attn_scalar", "residual_multiplier", "no_rope_layers",
]  # fmt: skip


@given(kind=st.sampled_from(native_types()), values=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_a_config_of_any_values_gives_a_decoder_or_one_line(kind: str, values: dict[str, Any]) -> None:
    try:
        read_decoder({"model_type": kind, **SIZES, **values}, 1)
    except InputError as error:
        assert "\n" not in str(error)


@given(config=st.dictionaries(st.sampled_from(["model_type", "architectures", "vision_config", "text_config"]), JSON))
def test_a_kind_of_any_values_is_known_or_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        check_kind(config, "base")


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_training_refuses_what_export_would_refuse_and_writes_nothing(quant: str, tmp_path: Path) -> None:
    make_base(tmp_path / "base", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="rope_type 'dynamic' is not supported"):
        train(TrainConfig(str(tmp_path / "base"), tmp_path / "rows.jsonl", tmp_path / "out", quant))
    assert not (tmp_path / "out").exists()


def test_a_hub_models_configs_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="base some/encoder is an encoder"):
        Base.find("some/encoder")
    assert asked == [["*.json"]]
    make_base(tmp_path)
    assert Base.find("some/model").config["model_type"] == "llama"
    assert len(asked) == 3


def test_a_base_that_vanishes_is_one_line(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    base = Base.open(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(EdgeloraError, match="cannot be read"):
        base.tensor("model.norm.weight")
