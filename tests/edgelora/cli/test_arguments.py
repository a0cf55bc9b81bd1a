"""Arguments such as [NAME=]ADAPTER[:WEIGHT]: what may be left out, and which paths are taken for what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelora.cli.arguments import parse_adapters, parse_mix, parse_paths
from edgelora_runtime.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

ADAPTERS = {
    "adapters/sql": {"sql": ("adapters/sql", 1.0)},
    "adapters/sql:0.6": {"sql": ("adapters/sql", 0.6)},
    "adapters/sql/": {"sql": ("adapters/sql/", 1.0)},
    "a=adapters/sql": {"a": ("adapters/sql", 1.0)},
    "a=adapters/sql:-1e-1": {"a": ("adapters/sql", -0.1)},
    "mixes/both.gguf:2": {"both": ("mixes/both.gguf", 2.0)},
    "runs/lr=0.1/sql": {"sql": ("runs/lr=0.1/sql", 1.0)},
    "sql-v1.5": {"sql-v1.5": ("sql-v1.5", 1.0)},
    "C:\\adapters\\sql:0.5": {"C-adapters-sql": ("C:\\adapters\\sql", 0.5)},
    "my adapter (2)": {"my-adapter-2": ("my adapter (2)", 1.0)},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("item", "expected"), ADAPTERS.items())
def test_name_and_weight_may_be_left_out(item: str, expected: dict[str, tuple[str, float]]) -> None:
    assert parse_adapters([item]) == expected


def test_a_path_that_exists_is_that_path(tmp_path: Path) -> None:
    for name in ("lr=2", "sql:2", "a=b:3"):
        (tmp_path / name).mkdir()
    assert parse_adapters(["lr=2"]) == {"lr-2": ("lr=2", 1.0)}
    assert parse_adapters(["sql:2"]) == {"sql-2": ("sql:2", 1.0)}
    assert parse_adapters(["sql:2:0.5"]) == {"sql-2": ("sql:2", 0.5)}
    assert parse_adapters(["a=b:3"]) == {"a-b-3": ("a=b:3", 1.0)}
    assert parse_adapters(["x=sql:2"]) == {"x": ("sql:2", 1.0)}


def test_the_current_folder_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sql").mkdir()
    monkeypatch.chdir(tmp_path / "sql")
    assert parse_adapters(["."]) == {"sql": (".", 1.0)}


def test_files_of_rows_are_named_after_themselves() -> None:
    assert parse_paths(["data/sql.jsonl", "medical=m.jsonl"], "") == {"sql": "data/sql.jsonl", "medical": "m.jsonl"}


@pytest.mark.parametrize("items", [["=x"], ["a="], [""], ["a=x", "a=y"], ["x/sql", "y/sql"], ["/"]])
def test_what_has_no_name_or_one_twice_is_refused(items: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_adapters(items)


def test_weights_from_a_file_join_those_of_the_arguments() -> None:
    by_pattern = {"sql": {"model.layers.0.*": 0.2}}
    assert parse_adapters(["x/sql"], by_pattern) == {"sql": ("x/sql", {"model.layers.0.*": 0.2})}
    assert parse_adapters(["x/sql:0.6"], by_pattern) == {"sql": ("x/sql", {"*": 0.6, "model.layers.0.*": 0.2})}
    with pytest.raises(UsageError, match="did you mean 'sql'"):
        parse_adapters(["x/sql"], {"sqll": 0.5})


def test_a_live_mix_takes_weight_1() -> None:
    assert parse_mix(["sql", "medical=0.3"]) == {"sql": 1.0, "medical": 0.3}


@given(
    st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1),
    st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1), min_size=1),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_what_is_written_is_read(name: str, parts: list[str], weight: float) -> None:
    path = "/".join(("nowhere", *parts))
    assert parse_adapters([f"{name}={path}:{weight!r}"]) == {name: (path, weight)}
    assert parse_adapters([f"{path}:{weight!r}"]) == {parts[-1][:64]: (path, weight)}
