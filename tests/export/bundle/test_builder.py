"""The builder rejects what it cannot build before it writes anything, and what it builds can be read."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgelora_export.architectures import read_decoder
from edgelora_export.base.base import Base
from edgelora_runtime import Bundle, Runtime
from edgelora_runtime.errors import InputError
from tests.tiny import CHAT_TEMPLATE, export_base, make_base

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(tiny_base, tmp_path / "base")


def change_config(base: Path, **settings: Any) -> None:
    config = json.loads((base / "config.json").read_bytes())
    for key, value in settings.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    (base / "config.json").write_text(json.dumps(config))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "other architecture": ({"model_type": "mamba"}, "model_type 'mamba'"),
    "no architecture": ({"model_type": None}, "model_type None"),
    "other activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "no widths": ({"hidden_size": None, "intermediate_size": None}, "lacks hidden_size, intermediate_size"),
    "rope kind": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'yarn'"),
    "more layers": ({"num_hidden_layers": 3}, "model.layers.2"),
    "other width": ({"intermediate_size": 80}, "has shape"),
}


@pytest.mark.parametrize(("settings", "mention"), CONFIGS.values(), ids=CONFIGS.keys())
def test_bases_that_cannot_be_built(base: Path, tmp_path: Path, settings: dict[str, Any], mention: str) -> None:
    change_config(base, **settings)
    with pytest.raises(InputError) as caught:
        export_base(base, tmp_path / "bundle")
    assert mention in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize(
    ("name", "raw"),
    [*((name, raw) for name in ("config.json", "model.safetensors") for raw in (None, b"", b"\xff")), ("tokenizer.json", None)],
)
def test_broken_bases(base: Path, tmp_path: Path, name: str, raw: bytes | None) -> None:
    (base / name).unlink()
    if raw is not None:
        (base / name).write_bytes(raw)
    with pytest.raises(InputError, match=name.split(".")[0]):
        export_base(base, tmp_path / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("bits", [32, 4])
def test_weights_that_are_not_finite(base: Path, tmp_path: Path, bits: int) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
    save_file(weights, base / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        export_base(base, tmp_path / "bundle", bits=bits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("context", [0, -1, 1025])
def test_impossible_context_lengths(tiny_base: Path, context: int) -> None:
    with pytest.raises(InputError, match="context_length"):
        read_decoder(Base.open(tiny_base).config, context)


def test_adapters_whose_files_would_collide(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> None:
    from edgelora.exporting.export import export
    from edgelora.exporting.recipe import Recipe, VariantRecipe

    adapters = {"a": tiny_adapters["plain"], "A": tiny_adapters["other"]}
    with pytest.raises(InputError, match="A, a differ only in case"):
        export(Recipe(str(tiny_base), adapters, {"v": VariantRecipe({"a": 1.0}, kind="live")}), tmp_path / "bundle")


def test_a_chat_template_inside_the_tokenizers_config(base: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").unlink()
    config = json.loads((base / "tokenizer_config.json").read_bytes()) | {"chat_template": CHAT_TEMPLATE}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    export_base(base, tmp_path / "bundle")
    with Runtime(tmp_path / "bundle") as runtime:
        assert runtime.tokenizer.render_chat([{"role": "user", "content": "x"}]) == "<s>user: x\nassistant:"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, 1, (1, 5, 6)),
        ({}, 1, (1,)),
        (None, [3], (1, 3)),
        (None, None, (1,)),
        ({"eos_token_id": 0}, [7, -1, 300], (1, 0, 7)),
    ],
)
def test_end_tokens_are_those_of_tokenizer_and_configs(
    base: Path, tmp_path: Path, generation: dict[str, Any] | None, config: Any, expected: tuple[int, ...]
) -> None:
    (base / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (base / "generation_config.json").write_text(json.dumps(generation))
    change_config(base, eos_token_id=config)
    export_base(base, tmp_path / "bundle")
    assert Bundle.open(tmp_path / "bundle").manifest.model.eos_token_ids == expected


def test_the_same_recipe_gives_the_same_bytes(tiny_base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_base(tiny_base, tmp_path / name, bits=4)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_a_tied_base_has_no_head_of_its_own(tmp_path: Path) -> None:
    """With a tied base the embedding is stored once, and the checkpoint need not hold lm_head."""
    make_base(tmp_path / "base", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "base" / "model.safetensors")
    export_base(tmp_path / "base", tmp_path / "bundle", bits=4)
    with Runtime(tmp_path / "bundle") as runtime:
        assert runtime.logits([5]).shape == (1, 300)
