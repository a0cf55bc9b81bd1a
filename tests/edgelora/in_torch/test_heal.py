"""Healing: the merged int4 of an adapter comes closer to the unmerged adapter, without labels, as a command does it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from edgelora.adapters.folder import read_provenance, write_provenance
from edgelora.data.encode_rows import RowEncoder
from edgelora.data.rows import read_rows
from edgelora.in_torch.heal import HealConfig, heal
from edgelora.in_torch.reference import load_adapted, load_merged
from edgelora.in_torch.train import train
from edgelora.in_torch.train_config import TrainConfig
from edgelora_export.base.base import Base
from edgelora_export.base.tokenizer import load_tokenizer
from edgelora_runtime.errors import InputError, ResourceError
from tests.edgelora.in_torch.test_merge_aware import write_rows
from tests.tiny import make_adapter, make_base

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, an NF4 adapter of it, and the rows that it was trained on."""
    folder = tmp_path_factory.mktemp("plain")
    make_base(folder / "base")
    rows = write_rows(folder / "rows.jsonl")
    config = TrainConfig(str(folder / "base"), rows, folder / "adapter", rank=8, lr=1e-2, max_steps=20, batch_size=4)
    train(config)
    return folder / "base", folder / "adapter", rows


def test_healed_adapter_is_closer_to_its_unmerged_self(plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, rows = plain
    seen: list[int] = []
    report = heal(
        HealConfig(str(base), adapter, tmp_path / "healed", steps=40, lr=5e-3), on_progress=lambda done, *_: seen.append(done)
    )
    assert seen == list(range(1, 41))
    assert report.source == rows.name
    assert report.kl_after < 0.7 * report.kl_before
    old, new = read_provenance(adapter), read_provenance(tmp_path / "healed")
    assert old is not None
    assert new is not None
    assert (new.base_quantization, new.merge_aware, new.data_sha256) == ("int4", True, old.data_sha256)
    assert new.init.startswith("healed: 40 steps from adapter ")
    assert (tmp_path / "healed" / new.data_file).samefile(rows)


def test_divergence_is_that_of_the_answers(plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, rows = plain
    few = tmp_path / "few.jsonl"
    few.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[:4]), encoding="utf-8")
    report = heal(HealConfig(str(base), adapter, tmp_path / "healed", steps=1, data=few))
    found = Base.find(str(base))
    encode, models = RowEncoder(load_tokenizer(found)), (load_adapted(found, adapter, "nf4"), load_merged(found, adapter))
    total, count = 0.0, 0
    for row in read_rows(few):
        tokens, start = encode.whole(row)
        with torch.no_grad():
            wanted, said = (model(torch.tensor([tokens])).logits[0, start - 1 :].log_softmax(dim=-1) for model in models)
        total += float((wanted.exp() * (wanted - said)).sum())
        count += len(tokens) - start + 1
    assert report.kl_before == pytest.approx(total / count, rel=1e-3)


def test_answers_beyond_the_length_are_refused(plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no answer begins within max_length = 2 tokens; raise it to \d+ or more"):
        heal(HealConfig(str(plain[0]), plain[1], tmp_path / "healed", steps=1, max_length=2))
    assert not (tmp_path / "healed").exists()


def test_adapter_of_another_tool_heals_on_general_text(plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    make_adapter(plain[0], tmp_path / "adapter")
    report = heal(HealConfig(str(plain[0]), tmp_path / "adapter", tmp_path / "healed", steps=1))
    assert report.source == "general text"
    new = read_provenance(tmp_path / "healed")
    assert new is not None
    assert (new.merge_aware, new.data_file, new.rank, new.alpha) == (True, "", 4, 8.0)


def test_healed_adapter_is_not_healed_again(plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    make_adapter(plain[0], tmp_path / "adapter")
    provenance = read_provenance(plain[1])
    assert provenance is not None
    write_provenance(tmp_path / "adapter", replace(provenance, merge_aware=True))
    with pytest.raises(InputError, match="merge-aware already"):
        heal(HealConfig(str(plain[0]), tmp_path / "adapter", tmp_path / "healed"))


def test_another_form_of_the_base_than_recorded_is_refused(plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="says 'nf4'"):
        heal(HealConfig(str(plain[0]), plain[1], tmp_path / "healed", quant="int4"))


def test_adapter_that_cannot_be_written_is_kept(
    plain: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgelora.in_torch.heal.write_provenance", fail)
    with pytest.raises(ResourceError, match=r"no space left.*is kept in .*healed\.kept"):
        heal(HealConfig(str(plain[0]), plain[1], tmp_path / "healed", steps=1))
    assert not (tmp_path / "healed").exists()
    assert (tmp_path / "healed.kept" / "adapter_model.safetensors").exists()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edgelora", "train", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_command_heals(plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = map(str, plain)
    done = run("--base", base, "--heal", "2", "--from", adapter, "--output", str(tmp_path / "healed"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    assert (tmp_path / "healed" / "edgelora.json").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--heal", "2"), "--heal N needs --from ADAPTER"),
        (("--heal", "2", "--from", "adapter", "--rank", "8"), "--heal N takes no --rank"),
        ((), "--data is missing"),
    ],
)
def test_wrong_calls_are_one_line(tmp_path: Path, arguments: tuple[str, ...], named: str) -> None:
    done = run("--base", "base", "--output", str(tmp_path / "out"), *arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
