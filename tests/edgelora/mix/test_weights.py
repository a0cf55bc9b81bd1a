"""Weights by pattern of module names: precedence, and files of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edgelora.cli.arguments import parse_adapters
from edgelora.mix.weights import describe_weight, idle_patterns, read_weights, weight_at
from edgelora_runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.down_proj"


def test_the_last_pattern_that_matches_counts() -> None:
    assert weight_at(0.5, Q) == 0.5
    assert weight_at({"*": 0.6, "model.layers.0.*": 0.2}, Q) == 0.2
    assert weight_at({"model.layers.0.*": 0.2, "*": 0.6}, Q) == 0.6
    assert weight_at({"model.layers.0.*": 0.2}, DOWN) == 0
    assert weight_at({"model.layers.1.*": 0.2}, DOWN) == 0, "layer 10 is not layer 1"
    assert weight_at({"MODEL.*": 1.0}, Q) == 0


def test_patterns_without_a_match_are_found() -> None:
    assert idle_patterns({"*": 1.0, "*.q_proj": 1.0, "*.k_proj": 1.0}, [Q, DOWN]) == ["*.k_proj"]
    assert idle_patterns(1.0, [Q]) == []


def test_weights_in_words() -> None:
    assert describe_weight(0.25, "sql") == "0.25 sql"
    assert describe_weight({"*": 0.6, "*.mlp.*": -1}, "sql") == "{*: 0.6, *.mlp.*: -1} sql"


def test_a_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text('[weights]\nmedical = 0.6\n[weights.sql]\n"*" = 0.6\n"model.layers.0.*" = 0.2\n', encoding="utf-8")
    assert read_weights(path) == {"medical": 0.6, "sql": {"*": 0.6, "model.layers.0.*": 0.2}}
    assert list(read_weights(path)["sql"]) == ["*", "model.layers.0.*"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "mention"),
    [
        ("", "weights must be a table"),
        ("weights = 3", "weights must be a table"),
        ("[sql]\na = 1\n[weights]\n", "sql is not a known key"),
        ('[weights]\nsql = "1"', "weights.sql = '1' is not a weight"),
        ("[weights.sql]", r"weights.sql = {} is empty"),
        ('[weights.sql]\n"*" = true', r'weights.sql."\*" = True is not a weight'),
        ('[weights.sql]\n"*" = inf\n"a" = nan', r'weights.sql."\*" = inf.*weights.sql."a" = nan'),
    ],
)
def test_mistakes_in_a_file_are_named(text: str, mention: str, tmp_path: Path) -> None:
    (tmp_path / "w.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=mention):
        read_weights(tmp_path / "w.toml")


def test_a_number_on_the_command_line_is_the_default_of_the_files_patterns() -> None:
    patterns = {"model.layers.0.*": 0.2}
    assert parse_adapters(["a=x:0.6", "b=y:1"], {"a": patterns}) == {"a": ("x", {"*": 0.6, **patterns}), "b": ("y", 1.0)}
    assert parse_adapters(["a=C:\\x"], {"a": patterns}) == {"a": ("C:\\x", patterns)}
    assert parse_adapters(["a=x"], {"a": 0.3}) == {"a": ("x", 0.3)}
    for weight in (0.3, {"*": 0.3}):
        with pytest.raises(UsageError, match="give only one of the two"):
            parse_adapters(["a=x:0.6"], {"a": weight})
    with pytest.raises(UsageError, match="names b, but no --adapter does"):
        parse_adapters(["a=x:0.6"], {"b": 1.0})
